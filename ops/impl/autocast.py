"""What autocast means for operators of ours, of which PyTorch's autocast does not know."""
import torch


def cast_inputs(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inputs in the type that autocast asks for on their device, or as they are where it is off."""
    device = inputs[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return inputs
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in inputs)
