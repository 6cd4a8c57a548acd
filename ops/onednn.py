"""Whether an ordinary call on the CPU may be computed by other operators than the ones PyTorch records and translates.

What takes their place here are operators of oneDNN, and functions that write to memory of their own.
"""
import platform

import torch
from torch import nn

from .transforms import is_traced_or_transformed

# oneDNN has kernels for other processors too, which these choices were not measured on.
_ONEDNN_ON_X86 = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def is_transformed() -> bool:
    """Whether a tracer, a mode, functorch or forward-mode AD sees the calls made here.

    They know PyTorch's own operators, each with its derivatives, its batching rule and its translation.
    """
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or is_traced_or_transformed()


def runs_on_onednn(*tensors: torch.Tensor | None) -> bool:
    """Whether this is an ordinary eager call, in float32 on an x86 CPU, that oneDNN may compute.

    Subclasses of tensors (quantised ones, say), autocast, `torch.backends.mkldnn.flags(enabled=False)`, and whatever
    compiles, exports, traces, counts or transforms the calls made here are left to PyTorch.

    Args:
        tensors: All tensors of the call; None stands for one that is left out.
    """
    if torch.compiler.is_compiling():  # first, for compilers cannot follow the rest
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.dtype != torch.float32:
            return False
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
    if not _ONEDNN_ON_X86 or not torch._C._get_mkldnn_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return not is_transformed()


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records a call of these tensors; None stands for one that is left out."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling `module` is computing the forward pass of `cls`, and nothing else.

    Not so for subclasses, which parametrisations are too, with hooks, or with a `forward` of the module's own.
    """
    if type(module) is not cls or "forward" in module.__dict__:
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and not torch.nn.modules.module._has_any_global_hook()
