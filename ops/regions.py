"""How a feature map is cut into a grid of equal regions, and how the bottom and right edges are padded.

Shape suffixes used in `ops`: B batch, H map height, W map width, Y region rows, X region columns, R = Y * X regions,
h region height, w region width, T = h * w tokens of a region, N heads, D head_dim, K top-k.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange


@dataclass(frozen=True)
class RegionGrid:
    """A `height` x `width` map cut into `rows` x `cols` regions of equal size, in row-major order.

    Regions are `ceil(height / rows)` x `ceil(width / cols)` tokens. Where they extend beyond the map, at the bottom
    and the right, they are padded; no region is padding alone.

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
            if (count - 1) * math.ceil(size / count) >= size:
                raise ValueError(
                    f"{count} regions along {side} {size} would leave one empty; "
                    f"RegionGrid.fit({self.height}, {self.width}, regions={count}) chooses a count that fits"
                )

    @classmethod
    def fit(cls, height: int, width: int, regions: int = 7) -> "RegionGrid":
        """The grid of at most `regions` x `regions` regions on a map of any size, none of them empty.

        Raises:
            ValueError: The map is empty or `regions` is not positive.
        """
        if regions < 1 or height < 1 or width < 1:
            raise ValueError(f"cannot cut a {height} x {width} map into {regions} x {regions} regions")
        rows = math.ceil(height / math.ceil(height / regions))
        cols = math.ceil(width / math.ceil(width / regions))
        return cls(height, width, rows, cols)

    @property
    def num_regions(self) -> int:
        return self.rows * self.cols

    @property
    def region_height(self) -> int:
        return math.ceil(self.height / self.rows)

    @property
    def region_width(self) -> int:
        return math.ceil(self.width / self.cols)

    @property
    def tokens_per_region(self) -> int:
        """T, padding included."""
        return self.region_height * self.region_width

    @property
    def padding(self) -> tuple[int, int]:
        """(rows, columns) of padding tokens at the bottom and the right."""
        return self.rows * self.region_height - self.height, self.cols * self.region_width - self.width

    @property
    def is_padded(self) -> bool:
        return self.padding != (0, 0)

    def region_of(self, row: int, col: int) -> int:
        """The region of the token in this row and column of the map."""
        return row // self.region_height * self.cols + col // self.region_width

    def pad(self, x_BHW: torch.Tensor) -> torch.Tensor:
        """(B, H, W, ...) -> (B, Y * h, X * w, ...), zeros at the bottom and right; `x_BHW` itself where none are."""
        pad_bottom, pad_right = self.padding
        if not self.is_padded:
            return x_BHW
        return F.pad(x_BHW, (0, 0) * (x_BHW.ndim - 3) + (0, pad_right, 0, pad_bottom))

    def crop(self, x_BHW: torch.Tensor) -> torch.Tensor:
        """(B, Y * h, X * w, ...) -> (B, H, W, ...): the view without the padding."""
        return x_BHW[:, : self.height, : self.width]

    def token_counts(self, device: torch.device | str | None = None) -> torch.Tensor:
        """How many real tokens each region holds, (Y, X) int64."""
        rows = (self.height - torch.arange(self.rows, device=device) * self.region_height).clamp(max=self.region_height)
        cols = (self.width - torch.arange(self.cols, device=device) * self.region_width).clamp(max=self.region_width)
        return rows[:, None] * cols

    def is_real(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Which tokens are of the map and not padding, (R, T) bool."""
        rows = torch.arange(self.rows * self.region_height, device=device) < self.height
        cols = torch.arange(self.cols * self.region_width, device=device) < self.width
        return rearrange(rows[:, None] & cols, "(y h) (x w) -> (y x) (h w)", y=self.rows, x=self.cols)
