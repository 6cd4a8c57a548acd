"""A figure for a paper: one query of a photograph, and where the last block of each routed stage looks."""
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from ops import AttentionRecord, RegionGrid
from utils import UserError, replace_file

from .photos import Looker, place_of, stride_of

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.patches import Rectangle

QUERY_COLOUR = "#ff5fa2"
# Inches of a column, and of a row at least, for the predictions, and at most, for a page.
_COLUMN = 2.6
_ROW = (1.3, 5.2)
# The photograph is drawn with this many pixels along its longer side, at most.
_LONGEST = 1200
_POINTS_PER_INCH = 72


class QueryError(UserError):
    """A query that is not in the photograph."""


def last_routed(found: dict[str, dict[str, AttentionRecord]]) -> dict[str, AttentionRecord]:
    """Of each stage, the last attention of tokens that is routed; by "stage 1" and so on, or by the modules' names."""
    last = {}
    for module, records in found.items():
        if records["map"].routing is not None:
            stage = place_of(module)["stage"]
            last[module if stage is None else f"stage {stage}"] = records["map"]
    return last


def region_box(grid: RegionGrid, region: int, stride: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a region, in pixels of an image of (height, width)."""
    row, col = divmod(region, grid.cols)
    top, left = row * grid.region_height * stride, col * grid.region_width * stride
    bottom = min(top + grid.region_height * stride, size[0])
    right = min(left + grid.region_width * stride, size[1])
    return left, top, right - left, bottom - top


@dataclass
class _Photo:
    """A photograph in panels whose axes count pixels of the network's input.

    Args:
        pixels: (height, width, 3), more than the network gets where there are more.
        size: (height, width) of the network's input.
        height: Inches of a panel.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    height: float

    def draw(self, axes, **kwargs):
        pixels = self.pixels.mean(2) if "cmap" in kwargs else self.pixels
        self.lay_over(axes, pixels, interpolation="antialiased", **kwargs)

    def lay_over(self, axes, values: np.ndarray, **kwargs):
        axes.imshow(values, **dict(interpolation="nearest") | kwargs, extent=(0, self.size[1], self.size[0], 0))

    def outline(self, axes, box: tuple[int, int, int, int], colour: str, width: float):
        """Outline a box, by a line that is thin beside it."""
        left, top, wide, tall = box
        points = min(self.height / self.size[0], _COLUMN / self.size[1]) * _POINTS_PER_INCH
        width = min(width, min(wide, tall) * points / 5)
        axes.add_patch(Rectangle((left, top), wide, tall, fill=False, edgecolor=colour, linewidth=width))

    def mark(self, axes, x: float, y: float):
        axes.plot(x, y, "*", color=QUERY_COLOUR, markersize=11, markeredgecolor="black")


def _draw_routes(axes, photo: _Photo, record: AttentionRecord, token: tuple[int, int], stride: int):
    """The routed regions in full light, the rest in the dark."""
    grid, routing = record.routing.query_grid, record.routing
    region = grid.region_of(*token)
    boxes = [region_box(routing.key_grid, key, stride, photo.size) for key in routing.routes[0, region].tolist()]
    darkness = np.full(photo.size, 0.7)
    for left, top, wide, tall in boxes:
        darkness[top : top + tall, left : left + wide] = 0
    photo.draw(axes)
    photo.lay_over(axes, np.zeros((*photo.size, 3)), alpha=darkness)
    for box in boxes:
        photo.outline(axes, box, "white", 0.7)
    photo.outline(axes, region_box(grid, region, stride, photo.size), QUERY_COLOUR, 2)


def _draw_weights(axes, photo: _Photo, record: AttentionRecord, token: tuple[int, int], stride: int):
    """The attention of the token, the mean of its heads, over the photograph in dark grey."""
    height, width = photo.size

    def on_pixels(values):
        return values.repeat_interleave(stride, 0).repeat_interleave(stride, 1)[:height, :width].numpy()

    weights = record.weights(*token)[0].mean(0)
    routed = on_pixels(record.is_routed(*token)[0].float())
    photo.draw(axes, cmap="gray", vmin=0, vmax=510)
    photo.lay_over(axes, on_pixels(weights / weights.max()), cmap="viridis", alpha=0.8 * routed, vmin=0, vmax=1)
    photo.mark(axes, (token[1] + 0.5) * stride, (token[0] + 0.5) * stride)


def _draw_scale(axes, height: float):
    """The colours of attention, at the bottom of a panel of that many inches."""
    scale = axes.inset_axes((0.02, 0.04, 0.9, 0.12 / height))
    scale.imshow(np.linspace(0, 1, 256)[None], cmap="viridis", aspect="auto", extent=(0, 1, 0, 1))
    scale.set_xticks([0, 1], ["0", "largest"], fontsize=8)
    scale.set_yticks([])
    scale.xaxis.tick_top()
    scale.tick_params(length=0)
    scale.set_frame_on(False)


def draw_figure(looker: Looker, image: Image.Image, name: str, query: tuple[float, float], path: Path):
    """Draw a photograph with its query, and below it what is predicted; beside it, for each routed stage, the regions
    that the query's region is routed to, and below them the attention of the query, the mean of its heads.

    After figure 4 of BiFormer's paper, https://arxiv.org/abs/2303.08810.

    Args:
        looker: The network.
        image: The photograph, RGB.
        name: Of the photograph.
        query: (y, x) in pixels of the photograph.
        path: Where it is written: .png, .jpg, .jpeg, .pdf or .svg.

    Raises:
        QueryError: There is no such pixel.
        SizeError: As of `Looker.size_of`.
    """
    if not (0 <= query[0] < image.height and 0 <= query[1] < image.width):
        raise QueryError(
            f"the query y {query[0]:g}, x {query[1]:g} lies outside of a photograph of {image.height} rows and "
            f"{image.width} columns"
        )
    images = looker.tensor(image, name)
    size = tuple(images.shape[-2:])
    shown = image.copy()
    shown.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    photo = _Photo(np.asarray(shown), size, float(np.clip(_COLUMN * size[0] / size[1], *_ROW)))
    y, x = query[0] / image.height * size[0], query[1] / image.width * size[1]
    stages = last_routed(looker.records(images))
    columns = 1 + len(stages)
    figure, axes = pyplot.subplots(
        2, columns, figsize=(_COLUMN * columns, 2 * photo.height + 0.5), layout="constrained", squeeze=False
    )
    for one in axes.flat:
        one.set_axis_off()
    photo.draw(axes[0, 0])
    photo.mark(axes[0, 0], x, y)
    axes[0, 0].set_title("query", fontsize=10)
    lines = [f"{label} {100 * share:.0f} %" for label, share in looker.guesses(images)]
    axes[1, 0].text(0.02, 0.98, "\n".join(lines), va="top", fontsize=10, transform=axes[1, 0].transAxes)
    _draw_scale(axes[1, 0], photo.height)
    for (stage, record), (above, below) in zip(stages.items(), axes[:, 1:].T, strict=True):
        stride = stride_of(size, record.query.shape[1:3])
        token = int(y // stride), int(x // stride)
        _draw_routes(above, photo, record, token, stride)
        _draw_weights(below, photo, record, token, stride)
        count = record.routing.routes.shape[-1]
        above.set_title(f"{stage}: {count} of {record.routing.key_grid.num_regions} regions", fontsize=10)
    kind = path.suffix.lower().removeprefix(".")
    replace_file(path, lambda file: figure.savefig(file, format=kind, dpi=150))
    pyplot.close(figure)
