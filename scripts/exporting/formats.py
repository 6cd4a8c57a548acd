"""The formats that networks are exported to, by name."""
import importlib.util
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import UsageError, UserError, one_line

from . import programs, runtimes
from .metadata import Metadata
from .opened import Exported, Run


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        ending: Of its files.
        write: Writes a network, in evaluation mode and without gradients, and what the file says of itself; in int8 by
            normalised images, (N, 3, H, W), where there are any.
        open: Opens such a file by its runtime; raises UserError where it is not of scripts/export.py.
        needs: Packages beside PyTorch, to write it and to run it.
        int8_needs: The same, to write it in int8; None where it cannot be.
        leaves_size_open: Whether it can take images of any size.
    """

    ending: str
    write: Callable[[nn.Module, Path, Metadata, torch.Tensor | None], None]
    open: Callable[[Path], Exported]
    needs: tuple[str, ...] = ()
    int8_needs: tuple[str, ...] | None = None
    leaves_size_open: bool = True


FORMATS = {
    "onnx": Format(".onnx", runtimes.write_onnx, runtimes.open_onnx, ("onnx", "onnxscript", "onnxruntime"), ()),
    "openvino": Format(
        ".xml", runtimes.write_openvino, runtimes.open_openvino, ("onnx", "onnxscript", "openvino"), ("nncf",)
    ),
    "torch_export": Format(".pt2", programs.write_program, programs.open_program),
    "aoti": Format(".pt2", programs.write_compiled, programs.open_compiled, int8_needs=("torchao",)),
    "torchscript": Format(".pt", programs.write_trace, programs.open_trace, leaves_size_open=False),
}
ENDINGS = tuple(dict.fromkeys(format.ending for format in FORMATS.values()))


def of_ending(file: Path) -> str:
    """The format that a new file of this name is written in.

    Raises:
        UsageError: There is none of this ending, or more than one.
    """
    names = [name for name, format in FORMATS.items() if format.ending == file.suffix]
    if not names:
        raise UsageError(f"{file} has none of the endings {', '.join(ENDINGS)}; name a --format")
    if len(names) > 1:
        raise UsageError(f"{file} may be {' or '.join(names)}; name a --format")
    return names[0]


def check_needs(name: str, int8: bool = False):
    """Raises UserError where a package is missing that files of the format are written or run with."""
    needs = FORMATS[name].needs + (FORMATS[name].int8_needs or () if int8 else ())
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _format_of(file: Path) -> str:
    if file.suffix != ".pt2":
        return of_ending(file)
    with zipfile.ZipFile(file) as archive:
        is_compiled = any("aotinductor" in name for name in archive.namelist())
    return "aoti" if is_compiled else "torch_export"


def _named(run: Run, file: Path) -> Run:
    """`run`, which names the file where it refuses images."""
    def call(x: torch.Tensor) -> torch.Tensor:
        try:
            return run(x)
        except MemoryError:
            raise
        except Exception as error:
            shape = " x ".join(map(str, x.shape))
            raise UserError(f"{file} does not take images of {shape}: {reason_of(error)}") from error

    return call


def reason_of(error: Exception) -> str:
    """How what a runtime or an exporter says begins."""
    return one_line(error)[:300]


def open_exported(file: Path) -> Exported:
    """The network in a file of scripts/export.py, opened by its own runtime on the CPU.

    Raises:
        UserError: There is no such file, it cannot be read, or the package that runs it is missing.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        name = _format_of(file)
        check_needs(name)
        metadata, run = FORMATS[name].open(file)
        return Exported(metadata, _named(run, file))
    except UserError:
        raise
    except Exception as error:  # each runtime has errors of its own for files that are damaged, or no networks
        raise UserError(f"{file} cannot be read: {reason_of(error)}") from error
