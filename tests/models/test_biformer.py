import pytest
import timm
import torch

import models
from helpers.costs import BIFORMER as COSTS
from helpers.published import assert_agrees, gmacs, published_state_dict, save_published
from models.biformer import checkpoint_filter_fn
from ops import BiLevelRoutingAttention

PUBLISHED = ["biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw"]
# parameters, GMACs at 224


@pytest.fixture
def published_file(tmp_path):
    return save_published("biformer_tiny", tmp_path / "biformer_tiny.pth")


@pytest.mark.parametrize(
    "name,impl", [*((name, "auto") for name in PUBLISHED), ("biformer_tiny", "gather"), ("biformer_tiny", "masked")]
)
def test_agrees_with_the_published_network(name, impl):
    model = timm.create_model(name, attn_impl=impl).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": published_state_dict(name)}, model))
    assert_agrees(model, name)


@pytest.mark.parametrize("name", COSTS)
def test_parameters(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == COSTS[name][0]


def test_nano_is_small():
    assert sum(p.numel() for p in timm.create_model("biformer_nano").parameters()) < 2_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTS)
def test_flops(name):
    assert gmacs(timm.create_model(name, attn_impl="gather")) == pytest.approx(COSTS[name][1], rel=0.01)


def test_regions_and_topk_are_open_to_the_caller():
    model = timm.create_model("biformer_nano", num_regions=4, topk=(1, 2, 3))
    attention = [stage.blocks[0].attn for stage in model.stages[:3]]
    assert [(a.num_regions, a.topk) for a in attention] == [(4, 1), (4, 2), (4, 3)]
    assert timm.create_model("biformer_nano", topk=2).stages[0].blocks[0].attn.topk == 2


@pytest.mark.parametrize("name", COSTS)
def test_padding_is_open_to_the_caller(name):
    """In the routed stages; the last one attends to the whole map and pads nothing."""
    for kwargs, expected in [({}, "masked"), (dict(padding="published"), "published")]:
        model = timm.create_model(name, device="meta", **kwargs)
        attentions = [block.attn for stage in model.stages for block in stage.blocks]
        routed = [a for a in attentions if isinstance(a, BiLevelRoutingAttention)]
        assert len(routed) == len(attentions) - len(model.stages[3].blocks)
        assert {attention.padding for attention in routed} == {expected}


@pytest.mark.parametrize("name", ["biformer_nano", "biformer_stl"])
@pytest.mark.parametrize("size,agree", [((224, 224), True), ((150, 203), False)])
def test_padding_matters_where_regions_do_not_divide_the_map(name, size, agree):
    """Maps of 224 x 224 are 56, 28, 14 and 7 wide: 7 regions divide them all."""
    torch.manual_seed(0)
    masked = timm.create_model(name, depths=(1, 1, 1, 1)).eval()
    published = timm.create_model(name, depths=(1, 1, 1, 1), padding="published").eval()
    published.load_state_dict(masked.state_dict())
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        ours, theirs = masked.forward_intermediates(images)[1], published.forward_intermediates(images)[1]
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and other.isfinite().all()
        assert one.equal(other) == agree


def test_published_padding_trains_at_an_odd_size():
    model = timm.create_model("biformer_nano", padding="published", num_classes=3)
    model(torch.randn(2, 3, 75, 50)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_features_with_published_padding():
    backbone = timm.create_model("biformer_nano", features_only=True, padding="published", num_regions=16)
    shapes = [tuple(x.shape[2:]) for x in backbone(torch.randn(1, 3, 96, 160))]
    assert shapes == [(24, 40), (12, 20), (6, 10), (3, 5)]


def test_routing_maps_with_published_padding():
    """Of as many regions as asked for, on every map."""
    model = timm.create_model("biformer_nano", padding="published").eval()
    for routing in models.collect_routing(model, torch.randn(1, 3, 75, 50)).values():
        assert routing.query_grid.num_regions == routing.routes.shape[1] == 49


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(topk=(1, 2)), r"topk must have one entry for each of the 3 routed stages, got \(1, 2\)"),
        (dict(depths=2), "depths must have one entry for each of the 4 stages, got 2"),
        (dict(head_dim=0), "head_dim must be at least 1, got 0"),
        (dict(head_dim=48), "head_dim must divide the routed stages' channels"),
        (dict(dims=(30, 64, 128, 256)), "head_dim must divide the routed stages' channels"),
        (dict(dims=(32, 64, 128, 100)), "num_heads must divide dim 100, got 8"),
        (dict(topk=0), "topk must be at least 1, got 0"),
        (dict(topk=64), "topk must be 1 to num_regions"),
        (dict(topk=(1, 4.0, 16)), "topk must be a whole number, got 4.0"),
        (dict(topk=True), "topk must be a whole number, got True"),
        (dict(num_regions=(7, 7)), r"num_regions must be a whole number, got \(7, 7\)"),
        (dict(dims=64), "dims must have one entry for each of the 4 stages, got 64"),
        (dict(dims=(32, 64, 128, 256.0)), "dims must be a whole number, got 256.0"),
        (dict(depths=(1, 1, -1, 1)), "depths must be at least 0, got -1"),
        (dict(depths="1131"), "depths must have one entry for each of the 4 stages, got 1131"),
        (dict(head_dim=32.0), "head_dim must be a whole number, got 32.0"),
        (dict(mlp_ratio="3"), "mlp_ratio must be a positive number, got '3'"),
        (dict(drop_rate=2), "drop_rate must be a number from 0 to 1, got 2"),
        (dict(drop_path_rate="0.1"), "drop_path_rate must be a number from 0 to 1, got '0.1'"),
        (dict(in_chans=0), "in_chans must be at least 1, got 0"),
        (dict(num_classes=10.0), "num_classes must be a whole number, got 10.0"),
        (dict(layout="swin"), "layout must be"),
        (dict(padding="same"), "padding must be 'masked' or 'published', got 'same'"),
    ],
)
def test_mistakes_are_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("biformer_nano", **kwargs)


def test_our_own_checkpoint_passes_the_filter_unchanged():
    model = timm.create_model("biformer_nano")
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model) is state


def test_pretrained_from_a_published_file(published_file):
    model = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(published_file)))
    expected = published_state_dict("biformer_tiny")
    torch.testing.assert_close(model.head.fc.weight.double(), expected["head.weight"], rtol=0, atol=1e-6)
    qkv = model.stages[1].blocks[0].attn.qkv.weight.double()
    torch.testing.assert_close(qkv, expected["stages.1.0.attn.qkv.qkv.weight"], rtol=0, atol=1e-6)


def test_pretrained_with_other_classes_and_channels(published_file):
    model = timm.create_model(
        "biformer_tiny",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(published_file)),
        num_classes=5,
        in_chans=1,
    )
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_pretrained_from_a_url(published_file, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    overlay = dict(url=published_file.as_uri())
    for _ in range(2):  # downloaded, then from the cache
        model = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    expected = published_state_dict("biformer_tiny")["head.bias"].float()
    assert model.head.fc.bias.equal(expected)
    assert len(list((tmp_path / "hub" / "checkpoints").glob("*-biformer_tiny.pth"))) == 1


@pytest.mark.parametrize("content", [None, b"<html>sign in</html>"])
def test_a_dead_link_says_what_to_do(content, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    page = tmp_path / "content"
    if content is not None:
        page.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"download them by hand.*pretrained_cfg_overlay=dict\(file="):
        timm.create_model("biformer_small", pretrained=True, pretrained_cfg_overlay=dict(url=page.as_uri()))
    assert not list((tmp_path / "hub").rglob("*content"))


def test_a_dead_link_costs_no_other_file(published_file, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=dict(url=published_file.as_uri()))
    with pytest.raises(RuntimeError, match="download them by hand"):
        timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=dict(url="file:///nowhere/x.pth"))
    assert len(list((tmp_path / "hub").rglob("*-biformer_tiny.pth"))) == 1


def test_released_weights_are_known():
    for name in PUBLISHED:
        assert timm.get_pretrained_cfg(name).url.startswith("https://")
    assert len({timm.get_pretrained_cfg(name).url for name in PUBLISHED}) == len(PUBLISHED)
