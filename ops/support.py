"""Whether Triton kernels can run here, said by one predicate that both selects and explains."""
import os
import shutil
import sys
import sysconfig
import warnings
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

_TRITON_LEAST = "3.3"  # earlier ones do not compile kernels that take tuples
_NOT_INSTALLED = "the package triton is not installed"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton reads the variable once, when it is imported, and then runs its kernels on the CPU, for tests.
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _installed_triton() -> str | None:
    """The version of Triton that is installed, without importing it."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def is_too_old(version: str) -> bool:
    """Whether the kernels cannot be compiled by this version of Triton."""
    return TorchVersion(version) < _TRITON_LEAST


def _has_headers(folder: str | None) -> bool:
    return bool(folder) and Path(folder, "Python.h").is_file()


def _launcher_lacks() -> str | None:
    """What is missing to compile the launcher, which Triton writes in C; it looks in the same places."""
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        return f"Triton compiles its launcher with the C compiler that CC names, and {compiler!r} was not found"
    if compiler is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton compiles its launcher with a C compiler, and none was found: install gcc or set CC"
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme for packages of /usr/local has no headers.
    include = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    # Compilers also read headers from the folders that these variables list.
    told = [folder for name in ("CPATH", "C_INCLUDE_PATH") for folder in os.environ.get(name, "").split(os.pathsep)]
    if not any(_has_headers(folder) for folder in (include, *told)):
        python = "python{}.{}-dev".format(*sys.version_info)
        return f"Triton compiles its launcher, and Python.h is missing in {include}: install {python}"
    return None


def _gpu_lacks(version: str | None, hip: str | None) -> str | None:
    """What this installation lacks to run Triton kernels on a GPU, whichever it is."""
    if hip is not None:
        return f"its kernels are not tested on ROCm, and this PyTorch is built for ROCm {hip}"
    if version is None:
        return _NOT_INSTALLED
    if is_too_old(version):
        return f"its kernels need Triton {_TRITON_LEAST} or newer, {version} is installed"
    return _launcher_lacks()


# Looked for once, on import: torch.compile takes the answers as constants, where it could not trace the search.
_TRITON_VERSION = _installed_triton()
_GPU_LACKS = _gpu_lacks(_TRITON_VERSION, torch.version.hip)


def _major(device: torch.device) -> int:
    """Of a GPU's compute capability."""
    return torch.cuda.get_device_properties(device).major


_known_major = lru_cache(maxsize=None)(_major)  # asking takes long; torch.compile looks through caches, and warns


def triton_unsupported(x: torch.Tensor | None = None, *others: torch.Tensor) -> str | None:
    """Why Triton kernels cannot compute on these tensors, or None where they can.

    Args:
        x: A tensor that the kernel would read. Without it, only what holds for every tensor is checked.
        others: More of them, on the same device.
    """
    if x is None:
        return _NOT_INSTALLED if _TRITON_VERSION is None else None
    for tensor in (x, *others):
        if tensor.dtype not in _DTYPES:
            return f"its kernels compute in bfloat16, float16 and float32, not in {tensor.dtype}"
    if x.is_cuda:
        major = (_major if torch.compiler.is_compiling() else _known_major)(x.device)
        return "its kernels need a GPU of compute capability 8.0 or newer" if major < 8 else _GPU_LACKS
    if not _TRITON_INTERPRETED or x.device.type != "cpu":
        return f"its kernels run on CUDA GPUs, the tensors are on {x.device.type}"
    return _NOT_INSTALLED if _TRITON_VERSION is None else None


_warned = set()


@torch.compiler.assume_constant_result  # torch.compile then calls it while it traces, which breaks no graph
def _warn_once(reason: str):
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"the fused kernels cannot run on this GPU, and what runs instead is many times slower: {reason}",
            stacklevel=3,
        )


def warn_of_fallback(reason: str):
    """Say once that a GPU computes without its kernels, where the installation is why.

    Args:
        reason: What `triton_unsupported` says. Of what no installation could compute, nothing is said.
    """
    if reason == _GPU_LACKS:
        _warn_once(reason)


LOW_PRECISION = (torch.bfloat16, torch.float16)
LAYER_IMPLS = ("torch", "triton")  # of layer norm and depthwise convolution


def check_layer_impl(impl: str):
    """Raises ValueError unless `impl` is "auto" or an implementation that can run here on some input."""
    if impl not in ("auto", *LAYER_IMPLS):
        raise ValueError(f"layer_impl must be auto, {' or '.join(LAYER_IMPLS)}, got {impl!r}")
    reason = triton_unsupported() if impl == "triton" else None
    if reason is not None:
        raise ValueError(f"layer_impl={impl!r}: {reason}")


def in_low_precision_on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda and x.dtype in LOW_PRECISION
