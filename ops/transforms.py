"""What PyTorch's transforms ask of operators of ours, which they do not know."""
import torch


def cast_inputs(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inputs in the type that autocast asks for on their device, or as they are where it is off."""
    device = inputs[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return inputs
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in inputs)


def needs_plain_operators() -> bool:
    """Whether a call has to consist of PyTorch's own operators: under torch.func, and in an export to ONNX."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # to ask for ONNX alone takes long
    return torch._C._are_functorch_transforms_active() or (tracing and torch.onnx.is_in_onnx_export())
