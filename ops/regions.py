"""How a feature map is cut into a grid of equal regions, and how the bottom and right edges are padded.

Shape suffixes used in `ops`: B batch, H map height, W map width, Y region rows, X region columns, R = Y * X regions,
h region height, w region width, T = h * w tokens of a region, N heads, D head_dim, K top-k.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .checks import check_whole
from .layout import crop_map, fixed_if_traced, is_open


def _divide_up(size: int, count: int) -> int:
    """ceil(size / count), by whole numbers: an export keeps it as an expression where `size` is symbolic."""
    return (size + count - 1) // count


def _count_that_fits(size: int, regions: int) -> int:
    """How many regions along a side, at most `regions`, leave none of them empty; symbolic sides may have empty ones.

    The regions are as large either way, so that a side has the same ones, and with a symbolic size empty ones at its
    end.
    """
    return regions if is_open(size) else _divide_up(size, _divide_up(size, regions))


@dataclass(frozen=True)
class RegionGrid:
    """A `height` x `width` map cut into `rows` x `cols` regions of equal size, in row-major order.

    Regions are `ceil(height / rows)` x `ceil(width / cols)` tokens. Where they extend beyond the map, at the bottom
    and the right, they are padded; no region is padding alone.

    In an export that leaves the map's size open, `height` and `width` are symbolic, and the numbers of regions are not:
    then there may be empty regions at the bottom and the right, which `token_counts` tells apart.

    Args:
        height: Map height in tokens, at least 1.
        width: Map width in tokens, at least 1.
        rows: Rows of regions, 1 to `height`.
        cols: Columns of regions, 1 to `width`.

    Raises:
        ValueError: The map is empty, or a region would hold nothing but padding.
    """
    height: int
    width: int
    rows: int
    cols: int

    def __post_init__(self):
        for side, size, count in (("height", self.height, self.rows), ("width", self.width, self.cols)):
            if size < 1:
                raise ValueError(f"a region grid needs a map of at least 1 x 1, got {side} {size}")
            if count < 1:
                raise ValueError(f"a region grid needs at least 1 region along the {side}, got {count}")
            if not is_open(size) and (count - 1) * _divide_up(size, count) >= size:
                raise ValueError(
                    f"{count} regions along {side} {size} would leave one empty; "
                    f"RegionGrid.fit({self.height}, {self.width}, regions={count}) chooses a count that fits"
                )

    @classmethod
    def fit(cls, height: int, width: int, regions: int = 7) -> "RegionGrid":
        """The grid of at most `regions` x `regions` regions on a map of any size, none of them empty.

        Raises:
            ValueError: The map is empty, or `regions` is no whole number from 1 up.
        """
        check_whole(regions=regions)
        if height < 1 or width < 1:
            raise ValueError(f"cannot cut a {height} x {width} map into {regions} x {regions} regions")
        height, width = fixed_if_traced(height, width)
        return cls(height, width, _count_that_fits(height, regions), _count_that_fits(width, regions))

    @property
    def num_regions(self) -> int:
        return self.rows * self.cols

    @property
    def region_height(self) -> int:
        return _divide_up(self.height, self.rows)

    @property
    def region_width(self) -> int:
        return _divide_up(self.width, self.cols)

    @property
    def tokens_per_region(self) -> int:
        """T, padding included."""
        return self.region_height * self.region_width

    @property
    def padding(self) -> tuple[int, int]:
        """(rows, columns) of padding tokens at the bottom and the right."""
        return self.rows * self.region_height - self.height, self.cols * self.region_width - self.width

    @property
    def has_open_size(self) -> bool:
        """Whether the map's size is left open, so that regions may be padded, or empty, or neither."""
        return is_open(self.height, self.width)

    @property
    def is_padded(self) -> bool:
        return self.has_open_size or self.padding != (0, 0)

    def region_of(self, row: int, col: int) -> int:
        """The region of the token in this row and column of the map."""
        return row // self.region_height * self.cols + col // self.region_width

    def pad(self, x_BHW: torch.Tensor) -> torch.Tensor:
        """(B, H, W, ...) -> (B, Y * h, X * w, ...), zeros at the bottom and right; `x_BHW` itself where none are."""
        pad_bottom, pad_right = self.padding
        if not self.is_padded:
            return x_BHW
        return F.pad(x_BHW, (0, 0) * (x_BHW.ndim - 3) + (0, pad_right, 0, pad_bottom))

    def split(self, x_BHW: torch.Tensor) -> torch.Tensor:
        """(B, H, W, ...) -> (B, Y, h, X, w, ...), a view where the map needs no padding."""
        sizes = self.rows, self.region_height, self.cols, self.region_width, *x_BHW.shape[3:]
        return self.pad(x_BHW).view(-1, *sizes)

    def crop(self, x_BHW: torch.Tensor) -> torch.Tensor:
        """(B, Y * h, X * w, ...) -> (B, H, W, ...): the view without the padding."""
        return crop_map(x_BHW, 0, 0, self.height, self.width)

    def token_counts(self, device: torch.device | str | None = None) -> torch.Tensor:
        """How many real tokens each region holds, (Y, X) int64."""
        rows = self.height - torch.arange(self.rows, device=device) * self.region_height
        cols = self.width - torch.arange(self.cols, device=device) * self.region_width
        return rows.clamp(0, self.region_height)[:, None] * cols.clamp(0, self.region_width)

    def is_real(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Which tokens are of the map and not padding, (R, T) bool."""
        rows = torch.arange(self.rows * self.region_height, device=device) < self.height
        cols = torch.arange(self.cols * self.region_width, device=device) < self.width
        rows_Yh, cols_Xw = rows.unflatten(0, (self.rows, -1)), cols.unflatten(0, (self.cols, -1))
        return (rows_Yh[:, None, :, None] & cols_Xw[:, None]).flatten(2).flatten(0, 1)
