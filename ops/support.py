"""Whether Triton kernels can run here, said by one predicate that both selects and explains."""
import os
from importlib import metadata

import torch


def _installed_triton() -> str | None:
    """The version of Triton that is installed, without importing it."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


_TRITON_VERSION = _installed_triton()
_TRITON_LEAST = (3, 3)  # earlier ones do not compile kernels that take tuples
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton reads the variable once, when it is imported, and then runs its kernels on the CPU, for tests.
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_unsupported(x: torch.Tensor | None = None) -> str | None:
    """Why Triton kernels cannot compute on `x`, or None where they can.

    Args:
        x: A tensor that the kernel would read. Without it, only what holds for every tensor is checked.
    """
    if _TRITON_VERSION is None:
        return "the package triton is not installed"
    if x is None:
        return None
    if x.dtype not in _DTYPES:
        return f"its kernels compute in bfloat16, float16 and float32, not in {x.dtype}"
    if x.device.type != "cuda":
        interpreted = _TRITON_INTERPRETED and x.device.type == "cpu"
        return None if interpreted else f"its kernels run on CUDA GPUs, the tensors are on {x.device.type}"
    if tuple(int(part) for part in _TRITON_VERSION.split(".")[:2]) < _TRITON_LEAST:
        return f"its kernels need Triton 3.3 or newer, {_TRITON_VERSION} is installed"
    if torch.cuda.get_device_properties(x.device).major < 8:
        return "its kernels need a GPU of compute capability 8.0 or newer"
    return None
