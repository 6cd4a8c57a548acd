"""Where the curves and pictures of a run are shown: TensorBoard, and Weights & Biases where it is asked for."""
import uuid
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils import UserError, replace_file

from .options import WandbOptions


class WandbError(UserError):
    """Weights & Biases cannot be used."""


class Tracker(Protocol):
    """Shows the values and pictures of a run by optimizer step, which never goes back."""

    def scalars(self, values: dict[str, float], step: int):
        """Points of the curves of these names."""

    def picture(self, name: str, pixels: np.ndarray, step: int):
        """A picture, uint8 (H, W, 3)."""

    def flush(self):
        """Write what is still in memory."""

    def close(self):
        """Flush, and end."""


class TensorBoard:
    """Writes to the folder `tensorboard` of a run; what the run had written after `step` is hidden."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.flush, self.close = self.writer.flush, self.writer.close

    def scalars(self, values: dict[str, float], step: int):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int):
        self.writer.add_image(name, pixels, step, dataformats="HWC")


class Wandb:
    """Logs to Weights & Biases; `wandb_id` in the run's folder is the run there, which a resumed run continues.

    Args:
        folder: The run's.
        options: The project.
        config: Settings of the run.

    Raises:
        WandbError: wandb cannot start, for example since nobody is logged in.
    """

    def __init__(self, folder: Path, options: WandbOptions, config: dict[str, Any]):
        self.wandb = wandb = import_module("wandb")  # whoever wants it installs it: it is in no requirements file
        file = folder / "wandb_id"
        if not file.exists():
            replace_file(file, lambda out: out.write(uuid.uuid4().hex[:8].encode()))
        try:
            self.run = wandb.init(
                project=options.project, name=folder.name, dir=str(folder), config=config, id=file.read_text(),
                resume="allow",
            )
        except wandb.Error as error:
            raise WandbError(f"wandb cannot start: {error}") from error

    def scalars(self, values: dict[str, float], step: int):
        self.run.log(values, step=step)

    def picture(self, name: str, pixels: np.ndarray, step: int):
        self.run.log({name: self.wandb.Image(pixels)}, step=step)

    def flush(self):
        """wandb sends by itself."""

    def close(self):
        self.run.finish()


def open_trackers(folder: Path, step: int, options: WandbOptions, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of a run in `folder` that starts, or resumes, after `step` optimizer steps.

    Raises:
        WandbError: Weights & Biases is asked for, and cannot be used.
    """
    trackers: list[Tracker] = []
    with ExitStack() as opened:
        try:
            trackers.append(TensorBoard(folder, step))
            opened.callback(trackers[0].close)
        except ImportError:
            print("training without TensorBoard's curves, since it is not installed: pip install tensorboard")
        if options.enable_wandb:
            trackers.append(Wandb(folder, options, config))
        opened.pop_all()  # they stay open
    return trackers
