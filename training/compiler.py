"""Whether torch.compile works on this machine, found out before a run starts."""
import torch

from utils import UserError, one_line


class CompilerError(UserError):
    """torch.compile cannot be used with this Python, this device or what is installed."""


def check_compiler(device: torch.device):
    """Compile and call a small function; later runs find it in the compiler's cache, in seconds.

    A network would meet the same error, but minutes later, and behind many lines that do not tell it from a fault of the
    network's.

    Raises:
        CompilerError: Something is missing here.
    """
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of its processes, of Triton, of a driver
        reason = one_line(error).partition(" Set TORCHDYNAMO_VERBOSE")[0][:200]
        raise CompilerError(f"torch.compile does not work on {device.type} here ({reason})") from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
