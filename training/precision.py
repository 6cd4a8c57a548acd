"""Mixed precision and memory layout."""
from dataclasses import dataclass

import torch

INITIAL_SCALE = 2.0**16  # of the loss, in float16


@dataclass(frozen=True)
class Precision:
    """The precision and the memory layout that a network computes in.

    Args:
        device_type: "cuda" or "cpu".
        amp_dtype: The low precision of autocast; None for full precision.
        channels_last: Hold images and weights channels last in memory.
    """

    device_type: str = "cpu"
    amp_dtype: torch.dtype | None = None
    channels_last: bool = False

    @classmethod
    def on(cls, device: torch.device, amp: str, channels_last: bool = False) -> "Precision":
        """What `amp` means on a device: "bf16", "fp16", "off", or "auto" for bf16 where a GPU computes in it."""
        if amp == "auto":
            amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
        return cls(device.type, dict(bf16=torch.bfloat16, fp16=torch.float16, off=None)[amp], channels_last)

    def autocast(self) -> torch.autocast:
        """The context in which the network is called."""
        return torch.autocast(self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A loss scaler, disabled unless the precision is float16."""
        return torch.amp.GradScaler(self.device_type, INITIAL_SCALE, enabled=self.amp_dtype == torch.float16)

    def arrange(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images in the network's memory layout."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def place(self, network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """The network on a device, its weights in the memory layout of its images."""
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        return network.to(device, memory_format=memory_format)
