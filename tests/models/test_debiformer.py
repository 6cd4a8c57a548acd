import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import models
from helpers.costs import DEBIFORMER as COSTS
from helpers.published import assert_agrees, gmacs, published_state_dict
from models._agent_attention import DeformableAgentAttention, ResidualConv2d
from models.debiformer import checkpoint_filter_fn
from scripts.bench.timing import peak_memory

# parameters, GMACs at 224, of which the paper's table says 2.6, 5.4 and 11.8


@pytest.mark.parametrize(
    "name,impl", [*((name, "auto") for name in COSTS), ("debiformer_tiny", "gather"), ("debiformer_tiny", "masked")]
)
def test_agrees_with_the_published_network(name, impl):
    model = timm.create_model(name, attn_impl=impl).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": published_state_dict(name)}, model))
    assert_agrees(model, name)


@pytest.mark.parametrize("name", COSTS)
def test_parameters(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == COSTS[name][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "debiformer_tiny",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("debiformer_small", "debiformer_base")),
])
def test_flops(name):
    assert gmacs(timm.create_model(name, attn_impl="gather")) == pytest.approx(COSTS[name][1], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [dict, lambda sd: {"model": sd}, lambda sd: {"state_dict": sd}])
def test_loads_every_published_layout(wrap):
    model = timm.create_model("debiformer_tiny").double()
    renamed = checkpoint_filter_fn(wrap(published_state_dict("debiformer_tiny")), model)
    model.load_state_dict(renamed)
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_published_names(size):
    ours, published = (timm.create_model(f"{prefix}_{size}", device="meta") for prefix in ("debiformer", "debi"))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in published.named_parameters()}


def attention(**kwargs):
    torch.manual_seed(0)
    settings = dict(dim=64, num_groups=2, stride=4, offset_kernel=7, table_side=28, mlp_ratio=2)
    return DeformableAgentAttention(**dict(settings, **kwargs)).double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("size,agents", [((28, 28), (7, 7)), ((9, 14), (3, 4)), ((1, 1), (1, 1)), ((3, 40), (1, 10))])
def test_agents_are_read_where_the_points_say(size, agents):
    """Bilinear interpolation, written out for one agent after the other."""
    module, (height, width) = attention(), size
    x = torch.randn(1, *size, 64, dtype=torch.float64)
    with torch.no_grad():
        read, points = module.make_agents(x, torch.randn_like(x) * 3)
    assert points.shape == (1, 2, *agents, 2) and points.abs().max() <= 1 and read.shape == (1, *agents, 64)
    for group in range(2):
        for i in range(agents[0]):
            for j in range(agents[1]):
                row, col = (points[0, group, i, j] + 1) / 2 * torch.tensor([height - 1, width - 1])
                expected = torch.zeros(32, dtype=torch.float64)
                for a in range(height):
                    for b in range(width):
                        weight = (1 - (row - a).abs()).clamp(min=0) * (1 - (col - b).abs()).clamp(min=0)
                        expected += weight * x[0, a, b, 32 * group : 32 * group + 32]
                torch.testing.assert_close(read[0, i, j, 32 * group : 32 * group + 32], expected)


def test_offsets_share_their_weights_over_groups():
    module = attention()
    query = torch.randn(1, 8, 12, 64, dtype=torch.float64)
    swapped = torch.cat([query[..., 32:], query[..., :32]], dim=-1)
    torch.testing.assert_close(module.offsets(swapped), module.offsets(query).flip(1))


def position_bias(module, points, height, width):
    positions = (torch.linspace(-1, 1, n, dtype=points.dtype) for n in (height, width))
    return module._position_bias(module._table(points), points, *positions)


def test_bias_depends_on_where_token_and_agent_are():
    """Where the table has the map's size, moving token and agent by one row each moves nothing."""
    module = attention()
    centre = torch.zeros(1, 2, 1, 1, 2, dtype=torch.float64)
    one_row = torch.tensor([2 / 27, 0.0], dtype=torch.float64)
    here, there = (position_bias(module, p, 28, 28).unflatten(2, (28, 28)) for p in (centre, centre + one_row))
    torch.testing.assert_close(there[:, :, 1:], here[:, :, :-1])
    assert here[0, 0].std() > 0
    table = module.bias_table[0]
    corner = position_bias(module, centre - 1, 28, 28).unflatten(2, (28, 28))
    torch.testing.assert_close(corner[0, 0, :, :, 0], table[27:, 27:])  # an agent in the corner sees a quarter


def test_tokens_attend_to_agents_with_the_bias():
    module = attention()
    x = torch.randn(2, 12, 8, 64, dtype=torch.float64)
    found = {}
    module.agent_key.register_forward_hook(lambda _, inputs, out: found.update(key=out))
    module.agent_value.register_forward_hook(lambda _, inputs, out: found.update(value=out))
    with torch.no_grad():
        out = module(x)
        query = module.qkv(x)[..., :64]
        points = module.routing(x).points
        bias = position_bias(module, points, 12, 8)
    query, key, value = (t.flatten(1, 2).unflatten(-1, (2, 32)).transpose(1, 2) for t in (query, *found.values()))
    attended = ((query @ key.transpose(-1, -2)) * 64**-0.5 + bias).softmax(-1) @ value
    torch.testing.assert_close(out, module.proj(attended.transpose(1, 2).reshape(x.shape)))


def output_and_gradients(module, x):
    x = x.clone().requires_grad_()
    out = module(x)
    return out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))


def limit_bands(monkeypatch, rows):
    """Bands of so many rows; gives the list of the attentions that are computed."""
    attended, attend = [], F.scaled_dot_product_attention

    def counting(*args, **kwargs):
        attended.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr(DeformableAgentAttention, "_rows_at_once", lambda *args: rows)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    return attended


@pytest.mark.parametrize("size", [(28, 28), (9, 14), (5, 40)])
def test_bands_of_rows_are_the_whole_map(size, monkeypatch):
    module, x = attention(attn_impl="gather"), torch.randn(2, *size, 64, dtype=torch.float64)
    whole = output_and_gradients(module, x)
    attended = limit_bands(monkeypatch, 3)
    for result, expect in zip(output_and_gradients(module, x), whole, strict=True):
        torch.testing.assert_close(result, expect, rtol=1e-10, atol=1e-12)
    assert len(attended) == 2 * -(-size[0] // 3)  # once forward, and once more for the gradients


@pytest.mark.parametrize("train", [False, True])
def test_memory_of_a_large_map_is_that_of_a_band(train):
    """All points and biases of 112 x 112 tokens would be 112 * 112 * 28 * 28 * 6 * 4 bytes, 225 MiB."""
    module = attention().float()
    x = torch.randn(1, 112, 112, 64)

    def run():
        with torch.set_grad_enabled(train):
            out = module(x)
        if train:
            out.sum().backward()

    run()
    assert peak_memory(run, torch.device("cpu")) < (80 if train else 40)


def test_bands_take_the_parameters_of_their_forward_pass(monkeypatch):
    """Not those that the module has when a band is computed again."""
    module, x = attention(attn_impl="gather"), torch.randn(1, 12, 8, 64, dtype=torch.float64)
    others = {name: (p + 0.3 * torch.randn_like(p)).detach().requires_grad_() for name, p in module.named_parameters()}

    def gradients():
        return torch.autograd.grad(torch.func.functional_call(module, others, (x,)).square().sum(), others.values())

    whole = gradients()
    limit_bands(monkeypatch, 5)
    for result, expect in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(result, expect, rtol=1e-9, atol=1e-9)


@pytest.mark.compile
def test_bands_export_for_any_batch(monkeypatch):
    module, x = attention(attn_impl="gather").requires_grad_(False), torch.randn(3, 12, 8, 64, dtype=torch.float64)
    whole = module(x)
    limit_bands(monkeypatch, 5)
    program = torch.export.export(module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert sum("scaled_dot_product" in str(node.target) for node in program.graph.nodes) == 3
    torch.testing.assert_close(program.module()(x), whole)


@pytest.mark.long
@pytest.mark.compile
def test_bands_compile(monkeypatch):
    module, x = attention(), torch.randn(2, 12, 8, 64, dtype=torch.float64, requires_grad=True)
    whole = output_and_gradients(module, x)
    monkeypatch.setattr(DeformableAgentAttention, "_rows_at_once", lambda *args: 5)
    out = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close((out, *torch.autograd.grad(out.square().sum(), x)), whole[:2])


def test_bands_know_transforms(monkeypatch):
    module, x = attention(attn_impl="gather"), torch.randn(1, 12, 8, 64, dtype=torch.float64)
    whole = output_and_gradients(module, x)[1]
    attended = limit_bands(monkeypatch, 5)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), whole)
    assert len(attended) == 3


def test_the_residual_of_a_convolution_keeps_the_weights_digits():
    """Beside 1, bfloat16 has no room for a small weight."""
    torch.manual_seed(0)
    conv = ResidualConv2d(8)
    x = torch.randn(2, 8, 6, 5)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1, groups=8)
    torch.testing.assert_close(conv(x), x + plain)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = x.bfloat16()
        assert conv(low).equal(low + F.conv2d(low, conv.weight, conv.bias, padding=1, groups=8))


def test_collect_routing():
    model = timm.create_model("debiformer_tiny").eval()
    routing = models.collect_routing(model, torch.randn(2, 3, 96, 64))
    assert len(routing) == 2 * sum(len(stage.blocks) for stage in model.stages)
    agents = routing["stages.0.blocks.0.second.attn"]
    assert agents.points.shape == (2, 1, 3, 2, 2) and agents.routes.shape == (2, 6, 4)
    assert (agents.query_grid.height, agents.key_grid.height) == (3, 24)
    assert routing["stages.0.blocks.0.first.attn"].points is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="ResNet has no routed attention"):
        models.collect_routing(timm.create_model("resnet10t"), torch.randn(1, 3, 32, 32))


def test_both_halves_of_a_block_share_its_stochastic_depth():
    model = timm.create_model("debiformer_tiny", drop_path_rate=0.3)
    rates = [[half.drop_path1.drop_prob for half in block] for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 7)[:, None].repeat(2, axis=1))


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(agent_topk=(4,)), r"agent_topk must have one entry for each of the 4 stages, got \(4,\)"),
        (dict(agent_topk=(0, 8, 16, 49)), "agent_topk must be at least 1"),
        (dict(topk=(1, 4)), "topk must have one entry for each of the 3 routed stages"),
        (dict(mlp_ratios=3), "mlp_ratios must have one entry for each of the 4 stages, got 3"),
        (dict(dims=(64, 128, 256)), "dims must have one entry for each of the 4 stages"),
        (dict(dims=(16, 128, 256, 512)), "the heads' channels must divide the stages' channels .*, got 32"),
        (dict(num_groups=(1, 2)), "num_groups must have one entry for each of the 4 stages"),
        (dict(num_groups=(0, 2, 4, 8)), "num_groups must be at least 1, got 0"),
        (dict(num_groups=(1, 2.0, 4, 8)), "num_groups must be a whole number, got 2.0"),
        (dict(agent_topk=(4, 8, "16", 49)), "agent_topk must be a whole number, got '16'"),
        (dict(num_regions=7.0), "num_regions must be a whole number, got 7.0"),
        (dict(agent_mlp_ratios=(3, 3, 0, 3)), "agent_mlp_ratios must be a positive number, got 0"),
        (dict(dims=(64, 128, 256, 512.0)), "dims must be a whole number, got 512.0"),
        (dict(drop_path_rate="0.1"), "drop_path_rate must be a number from 0 to 1, got '0.1'"),
        (dict(in_chans=0), "in_chans must be at least 1, got 0"),
        (dict(num_classes=10.0), "num_classes must be a whole number, got 10.0"),
        (dict(num_groups=(4, 2, 4, 8)), "num_groups must divide the number of heads 2, got 4"),
    ],
)
def test_mistakes_are_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("debiformer_tiny", device="meta", **kwargs)


def test_points_are_precise_under_autocast():
    module = attention().float()
    x = torch.randn(1, 28, 28, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        agents, points = module.make_agents(x, module.qkv(x)[..., :64])
    assert points.dtype == torch.float32
    assert agents.isfinite().all()


def test_deterministic_runs_sample_by_pytorchs_own_kernel(monkeypatch):
    """F.grid_sample may choose cuDNN, whose gradient is in no fixed order and raises no error."""
    torch.manual_seed(0)
    attention = DeformableAgentAttention(64, num_groups=1, stride=4, offset_kernel=5, table_side=14)
    x = torch.randn(2, 14, 14, 64)
    expected = attention(x)
    monkeypatch.setattr(F, "grid_sample", lambda *args, **kwargs: pytest.fail("F.grid_sample was called"))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(attention(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)
