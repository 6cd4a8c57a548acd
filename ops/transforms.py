"""What PyTorch's transforms ask of operators and modules of ours, which they do not know."""
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Proxy

_Module = TypeVar("_Module", bound=type[nn.Module])

# From PyTorch 2.7; before, the export to ONNX alone could be told from compiling.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.onnx.is_in_onnx_export)


def fx_leaf(cls: _Module) -> _Module:
    """Class decorator: torch.fx records calls of the module whole, and calls its hooks when the graph runs.

    For modules that look at sizes, types or devices, which torch.fx does not know while it traces. Which modules are
    traced through is up to the tracer; PyTorch's, torchvision's and timm's each keep a list, and take no word from the
    module. So a call whose first argument is a proxy records itself.
    """
    inherited = cls.__call__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], Proxy):
            return inherited(self, *args, **kwargs)
        tracer = args[0].tracer

        def record(*args: Any, **kwargs: Any) -> Proxy:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, record, args, kwargs)

    cls.__call__ = __call__
    return cls


def cast_inputs(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inputs in the type that autocast asks for on their device; as they are in float64, or where it is off."""
    device = inputs[0].device.type
    if device == "meta" or inputs[0].dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return inputs
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in inputs)


def is_traced_or_transformed() -> bool:
    """Whether torch.jit.trace, torch.func or forward-mode AD sees the calls made here."""
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_exported() -> bool:
    """Whether torch.export, which the export to ONNX begins with, records the calls made here."""
    return torch.compiler.is_compiling() and _is_exporting()


def needs_plain_operators() -> bool:
    """Whether a call has to consist of PyTorch's own operators, which tracers, transforms and other runtimes know."""
    return is_exported() if torch.compiler.is_compiling() else is_traced_or_transformed()
