"""Programs of torch.export: as they are, and compiled by AOTInductor."""
from pathlib import Path

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import nn

from .int8 import quantize_program
from .metadata import KEY, Metadata
from .opened import Exported, Run

MOST_IMAGES = 1024
# The side of images that networks take from, and that runtimes may be asked for up to.
LEAST_SIDE, MOST_SIDE = 32, 4096


def example_of(metadata: Metadata) -> torch.Tensor:
    """Images that an export follows through the network: two, for one would be taken for the only batch there is."""
    return torch.zeros(2 if "batch" in metadata.dynamic else 1, 3, *metadata.input_size)


def open_sides(metadata: Metadata) -> dict[int, torch.export.Dim]:
    """What of (batch, 3, height, width) is left open."""
    sides = {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)} if "batch" in metadata.dynamic else {}
    if "size" in metadata.dynamic:
        names = {2: "height", 3: "width"}
        sides |= {i: torch.export.Dim(name, min=LEAST_SIDE, max=MOST_SIDE) for i, name in names.items()}
    return sides


def export_program(network: nn.Module, metadata: Metadata) -> torch.export.ExportedProgram:
    """The network as PyTorch's own operators."""
    # PyTorch would note whether a region of the example is one token wide, and refuse all images of which none is.
    with symbolic_shapes.patch(backed_size_oblivious=True):
        return torch.export.export(
            network, (example_of(metadata),), dynamic_shapes=(open_sides(metadata),), strict=False
        )


def write_program(network: nn.Module, file: Path, metadata: Metadata, images: None = None):
    torch.export.save(export_program(network, metadata), file, extra_files={KEY: metadata.to_json()})


def open_program(file: Path) -> Exported:
    said = {KEY: ""}
    program = torch.export.load(file, extra_files=said)
    metadata = Metadata.from_json(said[KEY], str(file))
    return Exported(metadata, _without_grad(program.module()))


def write_compiled(network: nn.Module, file: Path, metadata: Metadata, images: torch.Tensor | None = None):
    # Frozen weights are stored in the order in which oneDNN reads them.
    settings = {"aot_inductor.metadata": {KEY: metadata.to_json()}, "freezing": True}
    program = export_program(network, metadata)
    if images is not None:
        program = export_program(quantize_program(program, images), metadata)
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)


def open_compiled(file: Path) -> Exported:
    program = torch._inductor.aoti_load_package(str(file))
    return Exported(Metadata.from_json(program.get_metadata().get(KEY), str(file)), _without_grad(program))


def write_trace(network: nn.Module, file: Path, metadata: Metadata, images: None = None):
    trace = torch.jit.trace(network, example_of(metadata), check_trace=False)
    torch.jit.save(trace, file, _extra_files={KEY: metadata.to_json()})


def open_trace(file: Path) -> Exported:
    said = {KEY: ""}
    trace = torch.jit.load(file, map_location="cpu", _extra_files=said)
    text = said[KEY]
    metadata = Metadata.from_json(text.decode() if isinstance(text, bytes) else text, str(file))
    return Exported(metadata, _without_grad(trace))


def _without_grad(run: Run) -> Run:
    return torch.no_grad()(run)
