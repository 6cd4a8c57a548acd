"""Networks that are built without memory, and given it later: timm's `init_weights`."""
import pytest
import torch
from torch import nn

from helpers.families import FAMILIES, shallow

NETWORKS = [("biformer_nano", dict(token_head=True)), ("biformer_stl", {}), *((name, {}) for name in FAMILIES[1:])]


def seeded(make):
    torch.manual_seed(0)  # that of `shallow`
    return make()


def tensors(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def equal(a, b):
    torch.testing.assert_close(tensors(a), tensors(b), rtol=0, atol=0)


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return shallow(name, **kwargs)


@pytest.mark.parametrize("name,kwargs", NETWORKS)
def test_a_network_of_the_meta_device_gets_the_weights_that_a_plain_one_has(name, kwargs):
    """With the same seed, bit for bit; nothing of what was in the memory before is left."""
    model = on_meta(name, **kwargs)
    assert all(tensor.is_meta for tensor in tensors(model).values())
    model.to_empty(device="cpu")
    for tensor in tensors(model).values():
        nn.init.constant_(tensor, float("nan") if tensor.is_floating_point() else 99)
    seeded(model.init_weights)
    equal(model, seeded(lambda: shallow(name, **kwargs)))


@pytest.mark.parametrize("name,kwargs", NETWORKS)
def test_weights_are_drawn_again(name, kwargs):
    model = seeded(lambda: shallow(name, **kwargs))
    model(torch.randn(2, 3, 64, 64))  # in training: batch norms have seen something
    seeded(model.init_weights)
    equal(model, seeded(lambda: shallow(name, **kwargs)))


@pytest.mark.parametrize("name,kwargs", NETWORKS)
def test_each_module_resets_what_is_its_own(name, kwargs):
    """As FSDP asks of modules on the meta device."""
    model = on_meta(name, **kwargs)
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            module.to_empty(device="cpu", recurse=False)
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                nn.init.constant_(tensor, float("nan") if tensor.is_floating_point() else 99)
            module.reset_parameters()
    assert all(tensor.isfinite().all() and (tensor != 99).all() for tensor in tensors(model).values())
