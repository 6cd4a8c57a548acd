"""What is collected of a network's attentions gives the outputs that they have."""
import pytest
import timm
import torch

import models
from helpers.records import attend

BIFORMER = dict(depths=(1, 1, 1, 1), dims=(32, 64, 64, 64), topk=(2, 3, 4))


def outputs_and_records(network, images):
    """Of each attention that has records: its module, its input, what it put out, and its records."""
    seen = {}

    def hook_of(name):
        return lambda module, inputs, output: seen.__setitem__(name, (module, inputs[0], output))

    for name, module in network.named_modules():
        if hasattr(module, "records"):
            module.register_forward_hook(hook_of(name))
    found = models.collect_attention(network, images)
    assert list(found) == list(seen)
    return {name: (*seen[name], records) for name, records in found.items()}


@torch.inference_mode()
@pytest.mark.parametrize("padding", ["masked", "published"])
def test_biformers_records_give_its_outputs(padding):
    """Routed or not, with either padding, on a map that regions do not divide."""
    torch.manual_seed(0)
    network = timm.create_model("biformer_nano", padding=padding, **BIFORMER).double().eval()
    found = outputs_and_records(network, torch.randn(1, 3, 45, 38, dtype=torch.float64))
    dense = [name for name, (*_, records) in found.items() if records["map"].routing is None]
    assert dense == ["stages.3.blocks.0.attn"]
    for module, x, output, records in found.values():
        record = records["map"]
        if record.routing is None:
            value = module.qkv(x).chunk(3, -1)[2]
            seen = x
        else:
            value = module._project(x).chunk(3, -1)[2]
            seen = value
        heads = value.unflatten(-1, record.key.shape[-2:])
        ours = module.lepe(seen, residual=attend(record, heads).flatten(3))[:, : x.shape[1], : x.shape[2]]
        torch.testing.assert_close(module.proj(ours), output, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_debiformers_records_give_its_outputs():
    """The agents', which are routed, and those of the map to the agents, which have a bias."""
    torch.manual_seed(0)
    network = timm.create_model("debiformer_nano").double().eval()
    for name, parameter in network.named_parameters():
        if "bias_table" in name or "offsets" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    found = outputs_and_records(network, torch.randn(1, 3, 45, 38, dtype=torch.float64))
    agents = [name for name, (*_, records) in found.items() if "agents" in records]
    assert len(agents) == 6 and len(found) == 10
    for name in agents:
        module, x, output, records = found[name]
        query, key, value = module.qkv(x).chunk(3, -1)
        sampled, _ = module.make_agents(x, query)
        attended = module._attend_to_regions(sampled, key, value)
        ours = attend(records["agents"], value.unflatten(-1, (-1, 32))).flatten(3)
        torch.testing.assert_close(ours, attended, rtol=1e-4, atol=1e-5)
        informed = module._inform(sampled, key, value)
        ours = attend(records["map"], module.agent_value(informed).unflatten(-1, (-1, 32))).flatten(3)
        torch.testing.assert_close(module.proj(ours), output, rtol=1e-4, atol=1e-5)


def test_networks_that_route_nothing():
    with pytest.raises(ValueError, match="ResNet has no routed attention"):
        models.collect_attention(timm.create_model("resnet10t"), torch.randn(1, 3, 32, 32))


def test_routes_are_those_that_are_collected():
    network = timm.create_model("debiformer_nano").eval()
    images = torch.randn(1, 3, 96, 64)
    records, routing = models.collect_attention(network, images), models.collect_routing(network, images)
    for name, expected in routing.items():
        kept = records[name].get("agents", records[name]["map"]).routing
        assert torch.equal(kept.routes, expected.routes) and kept.query_grid == expected.query_grid
