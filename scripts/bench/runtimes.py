"""A classifier on the CPU by several runtimes, in float32, bfloat16 and int8."""
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import timm
import torch
import torch._inductor.config as inductor
from torch import nn

from models import NetworkRecipe
from scripts.exporting import programs
from scripts.exporting.formats import FORMATS
from scripts.exporting.int8 import quantize_program
from scripts.exporting.runtimes import open_onnx, open_openvino
from scripts.exporting.source import Source
from tasks.networks import size_kwargs

from .timing import Trial, compare

PYTORCH, COMPILED, ONNX, OPENVINO = "PyTorch", "PyTorch, compiled", "ONNX Runtime", "OpenVINO"
REFERENCE = (PYTORCH, "float32")


@lru_cache(maxsize=1)
def source_of(name: str, size: tuple[int, int]) -> Source:
    """A network with random weights, which take as long as others."""
    torch.manual_seed(0)
    network = timm.create_model(name, **size_kwargs(name, size))
    return Source.of(network, NetworkRecipe(name, input_size=size), {})


@lru_cache(maxsize=1)
def quantized(name: str, size: tuple[int, int]) -> nn.Module:
    source = source_of(name, size)
    program = programs.export_program(source.network, source.metadata)
    return quantize_program(program, source.photographs([]))


def exported(format_name: str, precision: str, source: Source, folder: Path) -> Path:
    """The file that scripts/export.py writes without further flags; written once."""
    file = folder / f"{source.metadata.model}-{precision}{FORMATS[format_name].ending}"
    if not file.exists():
        images = source.photographs([]) if precision == "int8" else None
        FORMATS[format_name].write(source.network, file, source.metadata, images)
    return file


def in_pytorch(network: Callable, x: torch.Tensor, precision: str = "float32") -> Callable[[], None]:
    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            network(x)

    return run


def compiled(network: nn.Module, x: torch.Tensor, precision: str = "float32") -> Callable[[], None]:
    """Compiled for images of this shape, and with weights that are constants."""
    run = in_pytorch(torch.compile(network), x, precision)
    with inductor.patch(freezing=True):
        run()
    return run


def builders(source: Source, x: torch.Tensor, folder: Path) -> dict[tuple[str, str], Callable[[], Callable]]:
    """By runtime and precision, what prepares a call on the images."""
    network, key = source.network, (source.metadata.model, source.metadata.input_size)

    def by_file(format_name: str, precision: str, open_file: Callable) -> Callable[[], None]:
        run = open_file(exported(format_name, precision, source, folder)).run
        return lambda: run(x)

    return {
        REFERENCE: lambda: in_pytorch(network, x),
        (PYTORCH, "bf16"): lambda: in_pytorch(network, x, "bf16"),
        (COMPILED, "float32"): lambda: compiled(network, x),
        (COMPILED, "bf16"): lambda: compiled(network, x, "bf16"),
        (COMPILED, "int8"): lambda: compiled(quantized(*key), x),
        (ONNX, "float32"): lambda: by_file("onnx", "float32", open_onnx),
        (ONNX, "int8"): lambda: by_file("onnx", "int8", open_onnx),
        (OPENVINO, "float32"): lambda: by_file("openvino", "float32", open_openvino),
        (OPENVINO, "bf16"): lambda: by_file("openvino", "float32", partial(open_openvino, precision="bf16")),
        (OPENVINO, "int8"): lambda: by_file("openvino", "int8", open_openvino),
    }


def measure(name: str, size: tuple[int, int], threads: list[int], batches: list[int], trial: Trial) -> list[dict]:
    """One row for each runtime and precision, number of threads and batch size: rate, and its ratio to PyTorch in
    float32; or why it failed.
    """
    source, rows = source_of(name, size), []
    with tempfile.TemporaryDirectory() as folder:
        for count, batch in product(threads, batches):
            torch.set_num_threads(count)
            torch._dynamo.reset()
            prepare = builders(source, torch.randn(batch, 3, *size), Path(folder))
            about = {
                key: dict(model=name, runtime=key[0], precision=key[1], threads=count, batch=batch) for key in prepare
            }
            rows += compare(about, prepare, REFERENCE, batch, replace(trial, failures={}))
    return rows
