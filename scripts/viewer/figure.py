"""A figure for a paper: one query of a photograph, and where the last block of each routed stage looks."""
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
_FORMATS = ("png", "jpg", "pdf", "svg")


class FigureError(UserError):
    """A figure that cannot be drawn as asked."""


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


def _add_box(axes, box: tuple[int, int, int, int], colour: str, width: float):
    left, top, wide, tall = box
    axes.add_patch(Rectangle((left, top), wide, tall, fill=False, edgecolor=colour, linewidth=width))


def _draw_routes(axes, photo: np.ndarray, record: AttentionRecord, token: tuple[int, int], stride: int):
    """The routed regions in full light, the rest in the dark."""
    size = photo.shape[:2]
    grid, routing = record.routing.query_grid, record.routing
    region = grid.region_of(*token)
    light = np.full((*size, 1), 0.3)
    boxes = [region_box(routing.key_grid, key, stride, size) for key in routing.routes[0, region].tolist()]
    for left, top, wide, tall in boxes:
        light[top : top + tall, left : left + wide] = 1
    axes.imshow((photo * light).astype(np.uint8))
    for box in boxes:
        _add_box(axes, box, "white", 0.7)
    _add_box(axes, region_box(grid, region, stride, size), QUERY_COLOUR, 2)


def _draw_weights(axes, photo: np.ndarray, record: AttentionRecord, token: tuple[int, int], stride: int):
    """The attention of the token, the mean of its heads, over the photograph in grey."""
    height, width = photo.shape[:2]
    weights = record.weights(*token)[0].mean(0)
    weights = weights.repeat_interleave(stride, 0).repeat_interleave(stride, 1)[:height, :width]
    axes.imshow(photo.mean(2), cmap="gray", vmin=0, vmax=510)
    shares = (weights / weights.max()).numpy()
    axes.imshow(shares, cmap="viridis", alpha=(0.15 + 0.75 * shares) * (shares > 0), vmin=0, vmax=1)
    axes.plot((token[1] + 0.5) * stride, (token[0] + 0.5) * stride, "*", color=QUERY_COLOUR, markersize=10,
              markeredgecolor="black")


def draw_figure(looker: Looker, photo: Image.Image, query: tuple[float, float], path: Path):
    """Draw a photograph with its query, and below it what is predicted; beside it, for each routed stage, the regions
    that the query's region is routed to, and below them the attention of the query, the mean of its heads.

    After figure 4 of BiFormer's paper, https://arxiv.org/abs/2303.08810.

    Args:
        looker: The network.
        photo: RGB.
        query: (y, x) in pixels of the photograph.
        path: Where it is written: .png, .jpg, .pdf or .svg.

    Raises:
        FigureError: There is no such format, or no such pixel.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise FigureError(f"{path} is none of the formats of a figure: {', '.join(_FORMATS)}")
    if not (0 <= query[0] < photo.height and 0 <= query[1] < photo.width):
        raise FigureError(
            f"the query y {query[0]:g}, x {query[1]:g} lies outside of a photograph of {photo.height} rows and "
            f"{photo.width} columns"
        )
    images = looker.tensor(photo)
    size = tuple(images.shape[-2:])
    shown = np.asarray(photo.resize(size[::-1], Image.Resampling.LANCZOS), dtype=np.float64)
    y, x = query[0] / photo.height * size[0], query[1] / photo.width * size[1]
    stages = last_routed(looker.records(images))
    figure, axes = pyplot.subplots(
        2, 1 + len(stages), figsize=(2.6 * (1 + len(stages)), 5.2 * size[0] / size[1] + 0.5), layout="constrained",
        squeeze=False,
    )
    for one in axes.flat:
        one.set_axis_off()
    axes[0, 0].imshow(shown.astype(np.uint8))
    axes[0, 0].plot(x, y, "*", color=QUERY_COLOUR, markersize=14, markeredgecolor="black")
    axes[0, 0].set_title("query", fontsize=10)
    lines = [f"{label} {100 * share:.0f} %" for label, share in looker.guesses(images)]
    axes[1, 0].text(0.02, 0.98, "\n".join(lines), va="top", fontsize=10, transform=axes[1, 0].transAxes)
    for (stage, record), (above, below) in zip(stages.items(), axes[:, 1:].T, strict=True):
        stride = stride_of(size, record.query.shape[1:3])
        token = int(y // stride), int(x // stride)
        _draw_routes(above, shown, record, token, stride)
        _draw_weights(below, shown, record, token, stride)
        count = record.routing.routes.shape[-1]
        above.set_title(f"{stage}: {count} of {record.routing.key_grid.num_regions} regions", fontsize=10)
    replace_file(path, lambda file: figure.savefig(file, format=kind, dpi=150))
    pyplot.close(figure)
