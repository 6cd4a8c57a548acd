import argparse

import pytest
import timm
import torch

import models
from helpers.costs import VITAEV2 as COSTS
from helpers.families import are_channels_last
from helpers.published import assert_agrees, gmacs, published_state_dict
from models._cells import Attention
from models.vitaev2 import NormalCell, WindowAttention, checkpoint_filter_fn

# parameters, GMACs at 224
SHALLOW = dict(
    depths=(1, 1, 1, 1),
    dims=(16, 32, 64, 128),
    embed_dims=(16, 16, 32, 64),
    groups=(1, 8, 16, 32),
    reduction_groups=(1, 4, 8, 16),
    num_classes=5,
)


def shallow(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("vitaev2_s", **dict(SHALLOW, **kwargs))


def published_as(layout):
    """vitaev2_s's published weights in float32, as files hold them."""
    weights = {k: v.float() if v.is_floating_point() else v for k, v in published_state_dict("vitaev2_s").items()}
    if layout == "bare":
        return weights
    return {layout: weights, "epoch": 299, "args": argparse.Namespace(lr=5e-4, model="vitaev2_s")}


@pytest.mark.parametrize("name", COSTS)
def test_agrees_with_the_published_network(name):
    model = timm.create_model(name).double().eval()
    model.load_state_dict(checkpoint_filter_fn({"model": published_state_dict(name)}, model))
    assert_agrees(model, name)


@pytest.mark.parametrize("name", COSTS)
def test_parameters(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == COSTS[name][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTS)
def test_flops(name):
    assert gmacs(timm.create_model(name)) == pytest.approx(COSTS[name][1], rel=0.01)


@pytest.mark.parametrize("size", [(224, 224), (200, 217), (193, 224)])
def test_images_are_padded_at_the_bottom_and_right(size):
    model = shallow().eval()
    x = torch.randn(1, 3, *size)
    padded = torch.zeros(1, 3, 224, 224)
    padded[:, :, : size[0], : size[1]] = x
    for ours, expected in zip(model.forward_intermediates(x)[1], model.forward_intermediates(padded)[1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(model(x), model(padded), rtol=0, atol=0)


def plain_attention(attn, x, rows, cols):
    """One window or whole map at a time, one head at a time; `rows` and `cols` are those of the windows' top left."""
    batch, height, width, _ = x.shape
    out_dim = attn.proj.out_features
    head_dim = out_dim // attn.num_heads
    out = x.new_full((batch, height, width, out_dim), float("nan"))
    size_y, size_x = (getattr(attn, "window_size", side) for side in (height, width))
    for b in range(batch):
        for top in rows:
            for left in cols:
                places = [(top + i, left + j) for i in range(size_y) for j in range(size_x)]
                inside = [0 <= i < height and 0 <= j < width for i, j in places]
                tokens = torch.stack([
                    x[b, i, j] if real else torch.zeros_like(x[0, 0, 0])
                    for (i, j), real in zip(places, inside, strict=True)
                ])
                query, key, value = attn.qkv(tokens).chunk(3, dim=1)
                merged = torch.empty_like(value)
                for h in range(attn.num_heads):
                    of_head = slice(h * head_dim, (h + 1) * head_dim)
                    weights = (query[:, of_head] @ key[:, of_head].T / head_dim**0.5).softmax(dim=1)
                    merged[:, of_head] = weights @ value[:, of_head]
                result = attn.proj(merged) + (value if attn.value_skip else 0)
                for (i, j), real, token in zip(places, inside, result, strict=True):
                    if real:
                        out[b, i, j] = token
    return out


@pytest.mark.parametrize(
    "height,width,rows,cols",
    [
        (14, 7, (0, 7), (0,)),  # nothing padded
        (9, 13, (-2, 5), (0, 7)),  # 5 rows: 2 above, 3 below; 1 column: right
        (8, 4, (-3, 4), (-1,)),  # 6 rows: 3 above, 3 below; 3 columns: 1 left, 2 right
        (1, 1, (-3,), (-3,)),
    ],
)
@torch.inference_mode()
def test_windows(height, width, rows, cols):
    torch.manual_seed(0)
    attn = WindowAttention(12, 8, num_heads=2, window_size=7).double()
    x = torch.randn(2, height, width, 12, dtype=torch.float64)
    torch.testing.assert_close(attn(x), plain_attention(attn, x, rows, cols))


@pytest.mark.parametrize("value_skip", [False, True])
@torch.inference_mode()
def test_full_attention(value_skip):
    torch.manual_seed(0)
    attn = Attention(12, 8, num_heads=2, qkv_bias=False, value_skip=value_skip).double()
    assert attn.qkv.bias is None
    x = torch.randn(2, 5, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(attn(x), plain_attention(attn, x, (0,), (0,)))


@pytest.mark.parametrize("size", [(64, 96), (70, 96)])
def test_convolutions_read_and_write_channels_last(size):
    """In features_only too, which leaves out the model's own forward."""
    model = shallow(features_only=True).eval()
    seen = are_channels_last(model, torch.randn(2, 3, *size))
    assert len(seen) == 2 * sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) and all(seen)


def test_stochastic_depth_is_of_normal_cells():
    model = shallow(drop_path_rate=0.3)
    dropping = {name.rpartition(".")[0] for name, m in model.named_modules() if type(m).__name__ == "DropPath"}
    assert dropping == {f"stages.{i}.blocks.0" for i in range(4)}
    rates = [stage.blocks[0].drop_path1.drop_prob for stage in model.stages]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_stochastic_depth_is_followed():
    torch.manual_seed(0)
    cell = NormalCell(16, 1, 4, window_size=7, drop_path=0.99999)
    x = torch.randn(2, 7, 7, 16)
    assert cell.train()(x).equal(x)
    assert not torch.allclose(cell.eval()(x), x, atol=0.1)


def test_paths_are_dropped_apart():
    """Attention and convolutions: of many images, some keep one of the two alone."""
    torch.manual_seed(0)
    cell = NormalCell(4, 1, 1, drop_path=0.5).train()
    torch.nn.init.zeros_(cell.mlp.fc2.weight)
    for conv in (cell.pcm.conv3, cell.attn.proj):
        torch.nn.init.zeros_(conv.weight)
    torch.nn.init.constant_(cell.pcm.conv3.bias, 1.0)
    torch.nn.init.constant_(cell.attn.proj.bias, 10.0)
    torch.nn.init.zeros_(cell.mlp.fc2.bias)
    x = torch.zeros(64, 2, 2, 4)
    assert set(cell(x)[:, 0, 0, 0].tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_initial_weights():
    model = shallow()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(m.bias is None or not m.bias.any() for m in linears)
    assert torch.cat([m.weight.flatten() for m in linears]).std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bare", "model", "state_dict"])
def test_pretrained_from_a_published_file(layout, tmp_path):
    path = tmp_path / "published.pth"
    torch.save(published_as(layout), path)
    model = timm.create_model("vitaev2_s", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    published = published_as("bare")
    assert model.head.fc.weight.equal(published["head.weight"])
    assert model.stages[1].downsample.norm1.weight.equal(published["layers.1.RC.attn.norm1.weight"])
    assert model.stages[2].blocks[7].pcm.conv2.weight.equal(published["layers.2.NC.7.PCM.3.weight"])


@pytest.mark.parametrize("layout", ["model", "state_dict"])
def test_filter_takes_what_lies_around_the_weights(layout):
    wrapped = published_as(layout)
    out = checkpoint_filter_fn(wrapped, shallow())
    assert out["head.fc.weight"] is wrapped[layout]["head.weight"]
    own = {layout: shallow().state_dict()}
    assert checkpoint_filter_fn(own, shallow()) is own[layout]


def test_names_not_order_decide():
    model = timm.create_model("vitaev2_s", device="meta")
    published = published_as("bare")
    ours = checkpoint_filter_fn(published, model)
    backwards = checkpoint_filter_fn(dict(reversed(published.items())), model)
    assert set(ours) == set(model.state_dict()) == set(backwards)
    assert all(backwards[name] is value for name, value in ours.items())
    assert any(name.endswith("relative_position_index") for name in published)


def test_our_own_checkpoint_passes_the_filter_unchanged():
    model = shallow()
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model) is state


@pytest.mark.slow
def test_pretrained_with_other_classes_and_channels(tmp_path):
    path = tmp_path / "published.pth"
    torch.save(published_as("bare"), path)
    overlay = dict(file=str(path))
    model = timm.create_model("vitaev2_s", True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    for ours, published in (("prm.convs.3", "PRM.convs.3.0"), ("pcm.conv1", "PCM.0")):
        expected = published_as("bare")[f"layers.0.RC.{published}.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(model.get_submodule(f"stages.0.downsample.{ours}").weight.data, expected)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(depths=(2, 2, 8)), "depths must have one entry for each of the 4 stages"),
        (dict(num_heads=(1, 2, 3, 8)), "must divide the stages' channels"),
        (dict(reduction_heads=(1, 1, 2, 5)), "must divide the stages' channels"),
        (dict(num_heads=(0, 1, 2, 4)), "num_heads must be at least 1, got 0"),
        (dict(groups=(1, 8, 16, 32.0)), "groups must be a whole number, got 32.0"),
        (dict(reduction_groups=(1, 8, "16", 32)), "reduction_groups must be a whole number, got '16'"),
        (dict(window_size=(7, 7)), r"window_size must be a whole number, got \(7, 7\)"),
        (dict(drop_path_rate="0.1"), "drop_path_rate must be a number from 0 to 1, got '0.1'"),
        (dict(in_chans=0), "in_chans must be at least 1, got 0"),
        (dict(num_classes=10.0), "num_classes must be a whole number, got 10.0"),
        (dict(groups=(1, 8, 16, 3)), "groups must divide the stages' channels"),
        (dict(embed_dims=(16, 15, 32, 64)), "reduction_groups must divide embed_dims"),
        (dict(window_size=0), "window_size must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        shallow(**kwargs)


def test_the_class_is_offered():
    assert type(shallow()) is models.ViTAEv2
