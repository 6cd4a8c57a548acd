"""Evaluations of a small classifier by main.py."""
from pathlib import Path
from typing import Any

import timm
import torch

import main as program
import models  # noqa: F401, registers our models with timm

SMALL = ["--model", "biformer_nano", "--input_size", "32", "--batch_size", "4", "--num_workers", "0", "--device", "cpu"]


def write_weights(path: Path, num_classes: int) -> Path:
    """Untrained weights of biformer_nano, by seed 0; returns `path`."""
    torch.manual_seed(0)
    torch.save(timm.create_model("biformer_nano", num_classes=num_classes).state_dict(), path)
    return path


def evaluate(weights: Path, *arguments: Any) -> int:
    """The exit code of an evaluation of such weights."""
    return program.main([*SMALL, "--eval", "--resume", str(weights), *map(str, arguments)])
