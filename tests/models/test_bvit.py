import argparse
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

import main
import models  # noqa: F401
from helpers.costs import BVIT as COSTS
from helpers.golden import image
from helpers.published import gmacs, golden_tensors, published_state_dict, relative_error, save_published
from models.bvit import broad_attention, checkpoint_filter_fn
from training.distributed import Distributed
from training.precision import Precision

# parameters; GMACs at 224 for the class token, and for all tokens
SMALL = dict(embed_dim=24, depth=3, num_heads=2, num_classes=5)


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("bvit_5m", **{**SMALL, **kwargs}).double().eval()


def published_broad_attention(qkvs, num_heads):
    """As the paper writes it: everything concatenated, attended to, flattened head by head and pooled."""
    batch, tokens, width = qkvs[0].shape[0], qkvs[0].shape[1], qkvs[0].shape[2] // 3
    split = [qkv.reshape(batch, tokens, 3, num_heads, width // num_heads) for qkv in qkvs]
    query, key, value = torch.cat(split, dim=-1).permute(2, 0, 3, 1, 4)
    logits = query @ key.transpose(-2, -1) * (width // num_heads) ** -0.5
    attended = (logits.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, -1)
    return F.adaptive_avg_pool1d(attended, width)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_agrees_with_the_published_network(name, key):
    model = timm.create_model(name, stem_stride=2).double().eval()
    weights = published_state_dict(f"{name}_conv_stem")
    model.load_state_dict(checkpoint_filter_fn(weights if key is None else {key: weights}, model))
    with torch.inference_mode():
        assert relative_error(model(image(224, 224))[0], golden_tensors(f"{name}_conv_stem")["logits"]) < 1e-8


@pytest.mark.parametrize("depth,num_heads,head_dim", [(12, 3, 64), (12, 6, 64), (5, 2, 8), (1, 1, 4)])
def test_broad_attention_is_the_published_formulation(depth, num_heads, head_dim):
    torch.manual_seed(0)
    qkvs = [torch.randn(2, 7, 3 * num_heads * head_dim, dtype=torch.float64, requires_grad=True) for _ in range(depth)]
    expected = published_broad_attention(qkvs, num_heads)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weight).sum(), qkvs)
    ours = broad_attention(qkvs, num_heads)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), qkvs), grads, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(broad_attention(qkvs, num_heads, 1), expected[:, :1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_queries", [None, 1])
def test_broad_attention_in_bfloat16_is_as_exact_as_the_published_formulation(num_queries):
    torch.manual_seed(0)
    qkvs = [torch.randn(8, 64, 3 * 3 * 64).bfloat16() for _ in range(12)]
    exact = published_broad_attention([qkv.double() for qkv in qkvs], 3)[:, :num_queries]
    published = published_broad_attention(qkvs, 3)[:, :num_queries]
    ours = broad_attention(qkvs, 3, num_queries)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.2 * (published - exact).abs().mean()


@pytest.mark.parametrize("name", COSTS)
def test_parameters(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == COSTS[name][0]


@pytest.mark.parametrize("name", COSTS)
def test_flops(name):
    _, of_class_token, of_all = COSTS[name]
    assert gmacs(timm.create_model(name)) == pytest.approx(of_class_token, rel=0.005)
    assert gmacs(timm.create_model(name, global_pool="avg")) == pytest.approx(of_all, rel=0.005)


@pytest.mark.parametrize("size", [(224, 224), (40, 100)])
def test_broad_attention_for_the_class_token_alone_changes_no_logit(size):
    model = small()
    x = image(*size, batch=2)
    whole = model.forward_head(model.forward_features(x))
    torch.testing.assert_close(model(x), whole, rtol=1e-10, atol=1e-10)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(whole.square().sum(), parameters)
    torch.testing.assert_close(
        torch.autograd.grad(model(x).square().sum(), parameters), expected, rtol=1e-8, atol=1e-10
    )


def test_every_token_reaches_the_pools_that_read_it():
    x = image(64, 64)
    for pool, read in (
        ("token", lambda t: t[:, 0]),
        ("avg", lambda t: t[:, 1:].mean(1)),
        ("max", lambda t: t[:, 1:].amax(1)),
        ("", lambda t: t),
    ):
        model = small(global_pool=pool)
        tokens = read(model.forward_features(x))
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), tokens)
        torch.testing.assert_close(model(x), model.get_classifier()(tokens))


@pytest.mark.parametrize("stem_stride,size,grid", [(1, (224, 224), (14, 14)), (2, (224, 224), (7, 7)),
                                                   (1, (33, 95), (3, 6)), (2, (33, 95), (2, 3)), (1, (32, 32), (2, 2))])
def test_grid_of_an_image(stem_stride, size, grid):
    model = small(stem_stride=stem_stride, features_only=True)
    assert [f.shape[2:] for f in model(image(*size))] == [grid] * 3
    assert model.feature_info.reduction() == [16 * stem_stride] * 3
    assert small(stem_stride=stem_stride).forward_features(image(*size)).shape == (1, 1 + math.prod(grid), 24)


def test_padding_reaches_the_patches_at_the_edge_alone():
    model = small(depth=1, img_size=64)
    tokens, grid = model._embed(image(64, 50))
    whole, _ = model._embed(F.pad(image(64, 50), (0, 14)))
    assert grid == (4, 4)
    torch.testing.assert_close(tokens[:, 1:].unflatten(1, grid)[:, :, :3], whole[:, 1:].unflatten(1, grid)[:, :, :3])


def test_positions_are_resampled_for_other_sizes():
    model = small()
    for parameter in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token):
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(model._embed(image(224, 224))[0], model.pos_embed)
    expected = resample_abs_pos_embed(model.pos_embed, new_size=(6, 20), old_size=(14, 14))
    tokens, grid = model._embed(image(96, 310))
    assert grid == (6, 20)
    torch.testing.assert_close(tokens, expected)


def test_intermediates_as_tokens_and_as_maps():
    model = small()
    x = image(64, 96)
    pairs = model.forward_intermediates(
        x, indices=[0, 2], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True, norm=True
    )
    maps = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True, norm=True)
    for (tokens, prefix), mapped in zip(pairs, maps, strict=True):
        assert tokens.shape == (1, 24, 24) and prefix.shape == (1, 1, 24) and mapped.shape == (1, 24, 4, 6)
        torch.testing.assert_close(mapped.flatten(2).transpose(1, 2), tokens)
    torch.testing.assert_close(torch.cat(pairs[-1][::-1], dim=1), model.forward_features(x))


def test_a_network_without_its_last_layer_has_no_broad_attention():
    model = small()
    x = image(64, 64)
    second = model.forward_intermediates(x, indices=[1], intermediates_only=True, norm=True, output_fmt="NLC")[0]
    early, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert len(model.blocks) == 3
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2
    torch.testing.assert_close(model(x)[:, 1:], second)
    torch.testing.assert_close(model(x), early)


def test_weights_for_another_image_size_are_resampled():
    source, target = small(img_size=224), small(img_size=(96, 160))
    state = checkpoint_filter_fn(source.state_dict(), target)
    expected = resample_abs_pos_embed(source.pos_embed, new_size=(6, 10), old_size=(14, 14))
    torch.testing.assert_close(state["pos_embed"], expected.detach())
    target.load_state_dict(state)
    x = image(96, 160)
    torch.testing.assert_close(target(x), source(x))
    with pytest.raises(ValueError, match="60 positions are no square grid"):
        checkpoint_filter_fn(target.state_dict(), source)


def test_our_own_checkpoint_passes_the_filter_unchanged():
    for model in (small(), small(stem_stride=2)):
        state = model.state_dict()
        assert checkpoint_filter_fn(state, model) is state


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_pretrained_from_a_published_file(key, tmp_path):
    path = save_published("bvit_5m_conv_stem", tmp_path / "bvit.pth", key)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    model = timm.create_model("bvit_5m", **overlay, stem_stride=2).eval()
    expected = golden_tensors("bvit_5m_conv_stem")["logits"]
    with torch.inference_mode():
        assert relative_error(model(image(224, 224).float())[0], expected) < 1e-3
    model = timm.create_model("bvit_5m", **overlay, num_classes=5, in_chans=1, img_size=96)
    assert model.pos_embed.shape == (1, 37, 192)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_published_file_under_its_published_name(tmp_path):
    """As main.py reads it: the name, the file with its command line, the family's filter."""
    path = save_published("bvit_5m_conv_stem", tmp_path / "bvit.pth")
    assert isinstance(torch.load(path, weights_only=False)["args"], argparse.Namespace)
    argv = ["--arch", "BViT-5", "--data_path", "x", "--model_kwargs", "stem_stride=2", "--eval", "--resume", str(path)]
    task_class, settings = main.parse(argv)
    main.check_names(task_class, settings)
    task = task_class(settings, Distributed(torch.device("cpu")), Precision())
    model = task.network()
    task.load(model, settings.checkpoint.resume)
    expected = published_state_dict("bvit_5m_conv_stem")
    torch.testing.assert_close(model.stem.weight.double(), expected["conv.weight"], rtol=0, atol=1e-6)
    assert model.pos_embed.equal(expected["pos_embedding"][:, :50].float())


def test_no_weight_decay_of_the_class_token_and_the_positions():
    model = small()
    groups = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for p in groups[1]["params"]}
    assert groups[1]["weight_decay"] == 0.05 and id(model.patch_embed.proj.weight) in decayed
    assert not decayed & {id(model.cls_token), id(model.pos_embed)}


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(global_pool="map"), "global_pool must be one of"),
        (dict(num_heads=5), "num_heads must divide embed_dim 24, got 5"),
        (dict(num_heads=0), "num_heads must be at least 1, got 0"),
        (dict(num_heads=2.0), "num_heads must be a whole number, got 2.0"),
        (dict(embed_dim="24"), "embed_dim must be a whole number, got '24'"),
        (dict(depth=(2, 2)), r"depth must be a whole number, got \(2, 2\)"),
        (dict(stem_stride=2.0), "stem_stride must be a whole number, got 2.0"),
        (dict(img_size=0), "img_size must be at least 1, got 0"),
        (dict(img_size="224"), "img_size must be a whole number, got '224'"),
        (dict(img_size=(64, 64, 64)), r"img_size must be a side, or height and width, got \(64, 64, 64\)"),
        (dict(mlp_ratio=0), "mlp_ratio must be a positive number, got 0"),
        (dict(drop_path_rate="0.1"), "drop_path_rate must be a number from 0 to 1, got '0.1'"),
        (dict(in_chans=0), "in_chans must be at least 1, got 0"),
        (dict(num_classes=10.0), "num_classes must be a whole number, got 10.0"),
        (dict(stem_stride=0), "stem_stride must be at least 1, got 0"),
    ],
)
def test_mistakes_are_explained(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        small().reset_classifier(3, "map")
