"""TorchScript, which PyTorch has deprecated: tracing works, and scripting says what to do."""
import pytest
import timm
import torch

from helpers.families import FAMILIES, shallow
from models import detection, segmentation

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_network_is_the_network(name):
    model = shallow(name, num_classes=3).eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64), check_trace=False)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("make", [
    *(lambda name=name: shallow(name) for name in FAMILIES),
    *(lambda name=name: shallow(name, features_only=True, out_indices=[1]) for name in FAMILIES),
    lambda: torch.nn.Sequential(timm.create_model("biformer_nano")),
    lambda: segmentation.upernet("resnet10t", num_classes=3),
    lambda: detection.retinanet("resnet10t", num_classes=3),
])
def test_scripting_says_what_to_do(make):
    with pytest.raises(NotImplementedError, match=r"torch\.export.*torch\.jit\.trace") as caught:
        torch.jit.script(make().eval())
    assert "\n" not in str(caught.value)
