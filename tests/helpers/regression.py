"""A second task, in full: a network that predicts the brightness of a small image.

It shares only the run with classification: its batches are dictionaries, its loss has two parts, and its metric is
better where it is lower. As a program it kills itself at the batch that REGRESSION_DIES_AT says, once the
checkpoint REGRESSION_DIES_WITH is written.
"""
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

import main  # noqa: E402
from training.data.loader import EpochLoader, build_loader, seeded_sample  # noqa: E402
from training.distributed import Distributed  # noqa: E402
from training.flags import Group, at_least, flag, not_negative  # noqa: E402
from training.launcher import restart_count  # noqa: E402
from training.options import Settings  # noqa: E402
from training.signals import run_and_exit  # noqa: E402
from training.task import Task  # noqa: E402
from utils import UserError  # noqa: E402

SIDE = 4
IMAGES = dict(train=26, val=9)


class NoImagesError(UserError):
    """A split without images."""


@dataclass(frozen=True)
class RegressionOptions(Group):
    """Regression"""

    width: int = flag(8, "width of the hidden layer", type=int, check=at_least(1))
    noise: float = flag(0.1, "noise on the training images", type=float, check=not_negative)


@dataclass(frozen=True)
class RegressionSettings(Settings):
    """The settings of every run, and two of this task's own."""

    regression: RegressionOptions

    @property
    def name(self) -> str:
        return "brightness"


class Images(Dataset):
    """`SIDE` x `SIDE` images by index; by (index, seed) with noise that is a function of the seed."""

    def __init__(self, split: str, noise: float):
        generator = torch.Generator().manual_seed(len(split))
        self.images = torch.rand(IMAGES[split], 1, 1, 1, generator=generator).expand(-1, 1, SIDE, SIDE)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        image = self.images[index]
        sample = dict(image=image, brightness=image.mean())
        if seed is not None:
            with seeded_sample(seed):
                sample["image"] = image + self.noise * torch.randn_like(image)
        return sample


class MeanAbsoluteError:
    """A `training.task.Evaluator`."""

    def __init__(self):
        self.totals = torch.zeros(2, dtype=torch.float64)

    def update(self, network: nn.Module, batch: dict[str, torch.Tensor]):
        error = (network(batch["image"]) - batch["brightness"]).abs()
        self.totals += torch.tensor([error.sum().item(), len(error)])

    def compute(self, distributed: Distributed) -> dict[str, float]:
        error, images = distributed.sum(self.totals).tolist()
        if images == 0:
            raise NoImagesError("there was no image to evaluate")
        return dict(mae=error / images, images=int(images))


class RegressionTask(Task):
    """Trains a perceptron with batch norm and dropout."""

    settings_class = RegressionSettings
    metrics: ClassVar[dict[str, bool]] = dict(mae=False)
    advice: ClassVar[dict[type[UserError], str]] = {NoImagesError: "give it images"}
    settings: RegressionSettings

    @classmethod
    def check_names(cls, settings: RegressionSettings):
        """There is one network alone."""

    def dataset(self, split: str) -> Images:
        return Images(split, self.settings.regression.noise)

    def loader(self, dataset: Images, train: bool) -> EpochLoader:
        distributed = self.distributed if train else self.eval_processes
        return build_loader(
            dataset, self.settings.loader, distributed, train=train, seed=self.settings.machine.seed
        )

    def network(self) -> nn.Module:
        width = self.settings.regression.width
        return nn.Sequential(
            nn.Flatten(), nn.Linear(SIDE * SIDE, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.1),
            nn.Linear(width, 1), nn.Flatten(0),
        )

    def loss(self, network: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = network(batch["image"]).float()
        squared = F.mse_loss(outputs, batch["brightness"])
        spread = 0.1 * (outputs.std() - batch["brightness"].std()).abs()
        return squared + spread, dict(squared=squared.detach(), spread=spread.detach())

    def evaluator(self) -> MeanAbsoluteError:
        return MeanAbsoluteError()

    def dummy_batch(self, size: int, train: bool) -> dict[str, torch.Tensor]:
        device = self.distributed.device
        return dict(
            image=torch.zeros(size, 1, SIDE, SIDE, device=device), brightness=torch.zeros(size, device=device)
        )

    def count(self, batch: dict[str, torch.Tensor]) -> int:
        return len(batch["image"])


class DyingTask(RegressionTask):
    """Kills the main process at one batch, counted from the first start of the run."""

    batches = 0

    def loss(self, *arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.batches += torch.is_grad_enabled()  # not the check of a network before the run
        is_it = str(self.batches) == os.environ.get("REGRESSION_DIES_AT") and restart_count() == 0
        if is_it and self.distributed.is_main:
            while not Path(self.settings.checkpoint.output_dir, os.environ["REGRESSION_DIES_WITH"]).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(*arguments)


if __name__ == "__main__":
    run_and_exit(lambda: main.main(sys.argv[1:], tasks={"regression": DyingTask}))
