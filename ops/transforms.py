"""What PyTorch's transforms ask of operators of ours, which they do not know."""
import torch


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


def needs_plain_operators() -> bool:
    """Whether a call has to consist of PyTorch's own operators, which are known to tracers, transforms and ONNX."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return is_traced_or_transformed()
