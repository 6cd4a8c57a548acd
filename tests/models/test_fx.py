"""torch.fx in PyTorch's and torchvision's hands, whose tracers know nothing of timm's registers."""
import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor

import models
from helpers.families import FAMILIES, is_plain, shallow
from models._layers import LayerNorm
from models._ops import BiLevelRoutingAttention, DepthwiseConv

NAMES = [*FAMILIES, "biformer_stl"]


def network(name, **kwargs):
    model = shallow(name, num_classes=5, **kwargs).eval()
    for module in model.modules():  # which otherwise do nothing in evaluation
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_network_is_the_network(name):
    """For images of any size, and in training too."""
    model = network(name)
    traced = torch.fx.symbolic_trace(model)
    for shape in ((1, 3, 64, 64), (2, 3, 96, 40)):
        x = torch.randn(shape)
        equal(traced(x), model(x))
    model = network(name, drop_path_rate=0.2).train()
    traced = torch.fx.symbolic_trace(model)
    outputs = []
    for each in (model, traced):
        torch.manual_seed(1)
        y = each(torch.randn(3, 3, 64, 64))
        outputs.append((y, torch.autograd.grad(y.square().sum(), list(model.parameters()))))
    equal(*outputs)


@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_features_are_the_maps(name):
    model = network(name)
    nodes = [info["module"] for info in model.feature_info]
    if is_plain(model):
        nodes = nodes[:-1]  # BViT's broad attention follows the last block
    extractor = create_feature_extractor(model, [*nodes, "head.fc"])
    x = torch.randn(2, 3, 64, 96)
    found = extractor(x)
    fmt = getattr(model, "output_fmt", "NCHW")
    maps = model.forward_intermediates(x, intermediates_only=True, output_fmt=fmt)
    for node, expected in zip(nodes, maps, strict=False):
        equal(found[node][:, 1:] if fmt == "NLC" else found[node], expected)
    equal(found["head.fc"], model(x))


# Those left have no convolution right before them: the norm of the last map, and the stl layout's, which come first.
@pytest.mark.parametrize("name,left", [
    ("biformer_nano", {"norm"}),
    ("biformer_stl", {"norm", *(f"stages.{i}.downsample.norm" for i in (1, 2, 3))}),
    ("debiformer_nano", {"norm"}),
    ("bvit_5m", set()),
    ("vitae_b", set()),
    ("vitae_tiny", set()),
    ("vitaev2_s", set()),
])
def test_batch_norms_are_fused_into_convolutions(name, left):
    model = network(name)
    fused = fuse(model)
    called = {node.target for node in fused.graph.nodes if node.op == "call_module"}
    assert {n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d) and n in called} == left
    x = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["biformer_nano", "debiformer_nano"])
def test_hooks_are_called_when_the_graph_runs_and_not_when_it_is_recorded(name):
    model, seen = network(name), []
    watched = [m for m in model.modules() if isinstance(m, (BiLevelRoutingAttention, DepthwiseConv, LayerNorm))]
    for module in watched:
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        module.register_forward_hook(lambda module, inputs, output: None if isinstance(output, tuple) else 2 * output)
    traced = torch.fx.symbolic_trace(model)
    assert watched and not seen
    x = torch.randn(1, 3, 64, 64)
    equal(traced(x), model(x))
    assert all(type(value) is torch.Tensor for value in seen)


def test_routes_are_collected_from_a_traced_network():
    model = network("biformer_nano")
    x = torch.randn(1, 3, 64, 64)
    found = models.collect_routing(torch.fx.symbolic_trace(model), x)
    equal([r.routes for r in found.values()], [r.routes for r in models.collect_routing(model, x).values()])
