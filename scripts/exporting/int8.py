"""Linear layers and convolutions in 8-bit integers, by the quantizer of each runtime."""
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import nn

CALIBRATION_IMAGES = 256


def spread(paths: list[Path], most: int) -> list[Path]:
    """At most so many of them, evenly over the list."""
    return [paths[len(paths) * i // most] for i in range(most)] if len(paths) > most else paths


@contextmanager
def without_advice() -> Iterator[None]:
    """ONNX Runtime's quantizer advises, on the root logger, to optimise the file first, which it does again itself."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def quantize_onnx(source: Path, target: Path):
    """Quantize the weights of linear layers for each channel, and their inputs by the range in each batch.

    Convolutions stay in float32: with the static ranges that they need, more routes changed (docs/export.md).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with without_advice():
        quantize_dynamic(source, target, ["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)


def quantize_openvino(model, images: torch.Tensor):
    """Quantize an `openvino.Model` by the ranges of its activations on `images`, (N, 3, H, W).

    Depthwise convolutions stay in float32: NNCF would quantize their inputs for each channel, before a transposition
    that gives these another axis.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    examples = nncf.Dataset([image.numpy() for image in images.split(1)])
    # It draws progress bars, and computes with masks that are minus infinity.
    with redirect_stdout(sys.stderr), np.errstate(invalid="ignore"):
        return nncf.quantize(
            model, examples, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(types=["GroupConvolution"], validate=False),
        )


def quantize_program(
    program: torch.export.ExportedProgram, images: torch.Tensor, is_dynamic: bool = False
) -> nn.Module:
    """Quantize the module of a program by the ranges of its activations on `images`, (N, 3, H, W).

    Where it `is_dynamic`, ranges are those of each batch, and convolutions stay in float32. The result marks what
    TorchInductor then compiles to products of integers; see PyTorch's "PT2E quantization".
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic))
    # Without what the export noted of its example: of networks with convolutions in channels-last layout, that it is
    # more than one image.
    observed = prepare_pt2e(program.module(check_guards=False), quantizer)
    for image in images.split(1):  # the program may be for one
        observed(image)
    return convert_pt2e(observed)
