"""What networks of every family share: how weights are drawn, and what they are not made for."""
from typing import NoReturn

from timm.layers import ClassifierHead, trunc_normal_
from timm.models import named_apply
from torch import nn


class NotScriptable:
    """A module that looks at devices and types, which TorchScript cannot, and refuses it with advice."""

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}, and PyTorch has deprecated it: "
            "use torch.export.export, torch.compile, or torch.jit.trace for images of one size"
        )


class Network(NotScriptable, nn.Module):
    """A network whose weights can be drawn again, as timm's can: after `to_empty` of one on the meta device, say.

    Attributes:
        output_strides: What `output_stride` may be, the stride of the last map; nothing where there is no choice.
        head: The classifier, timm's `ClassifierHead`.
        built_first: Names of children that are built before their siblings, where those come first in the module.
    """

    output_strides: tuple[int, ...] = ()
    head: ClassifierHead
    built_first: tuple[str, ...] = ()

    @classmethod
    def check_output_stride(cls, output_stride: int):
        """Raises ValueError unless the network can have this `output_stride`."""
        if not isinstance(output_stride, int) or output_stride not in cls.output_strides:
            strides = " or ".join(map(str, cls.output_strides)) or "left out, its maps have the stride of its patches"
            raise ValueError(f"output_stride of {cls.__name__} must be {strides}, got {output_stride!r}")

    @staticmethod
    def _init_weights(module: nn.Module, name: str = ""):
        """Draw the weights of a module within the network that are not as the module's constructor draws them."""
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _reset_head(self, num_classes: int, pool_type: str | None = None):
        """Replace the classifier by one like the network, in its device and type, and the pooling if one is given."""
        self.head.reset(num_classes, pool_type=pool_type)
        parameter = next(self.parameters())
        self.head.to(device=parameter.device, dtype=parameter.dtype)

    def _reset(self, module: nn.Module):
        """Every `reset_parameters` in a module, in the order in which its parts were built."""
        for _, child in sorted(module.named_children(), key=lambda item: item[0] not in self.built_first):
            self._reset(child)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def init_weights(self, needs_reset: bool = True):
        """Set all parameters and buffers; with one seed, to what building the network sets them to.

        Args:
            needs_reset: Start with every module's `reset_parameters`, which a module that was just built has behind it.
        """
        if needs_reset:
            self._reset(self)
        named_apply(self._init_weights, self)
