"""torch.compile's failures, told in a line: on this machine, found out before a run starts, and on a network."""
import sys

import torch

from utils import UserError, one_line


class NoCompilerError(UserError):
    """torch.compile cannot be used with this Python, this device or what is installed."""


class CompilationError(UserError):
    """torch.compile works here, but failed on the network."""


def check_compiler(device: torch.device):
    """Compile and call a small function; later runs find it in the compiler's cache, in seconds.

    A network would meet the same error, but minutes later, and in many lines that may as well tell of a fault of its
    own.

    Raises:
        NoCompilerError: Something is missing here.
    """
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of its processes, of Triton, of a driver
        raise NoCompilerError(f"torch.compile does not work on {device.type} here ({_words(error)})") from error


def compiled(network: torch.nn.Module, is_main: bool) -> torch.nn.Module:
    """torch.compile of a network, which compiles in its first pass; the main process says so."""
    if is_main:
        print("compiling the network: its first pass takes minutes, or seconds where the cache has it", flush=True)
    return torch.compile(network)


def compilation_error(error: Exception) -> CompilationError | None:
    """An error of the compiler's as one of ours; None for any other error."""
    # Errors may come from a disk that is full or gone: what was not imported before is not imported here.
    exceptions = sys.modules.get("torch._dynamo.exc")
    if exceptions is None or not isinstance(error, exceptions.BackendCompilerFailed):
        return None
    return CompilationError(f"torch.compile cannot compile this network here ({_words(error)})")


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def _words(error: Exception) -> str:
    """The start of an error, without torch's hints for its own developers."""
    return one_line(error).partition(" Set TORCHDYNAMO_VERBOSE")[0][:200]
