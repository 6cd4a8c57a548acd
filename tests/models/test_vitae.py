import argparse
import inspect
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from helpers import published
from helpers.costs import VITAE as COSTS
from helpers.families import are_channels_last, shallow
from helpers.golden import image
from helpers.published import assert_agrees, gmacs, published_state_dict, relative_error
from models.vitae import KernelAttention, NormalCell, PlainCell, checkpoint_filter_fn, kernel_attention
from storage.weights import MismatchError, load_weights
from training.run import create_ema

PLAIN = ["vitae_b", "vitae_l", "vitae_h"]
STAGES = [name for name in COSTS if name not in PLAIN]
# Random features of both reduction cells.
FEATURES = {"vitae_tiny": 4096, "vitae_6m": 4096, "vitae_13m": 4096, "vitae_s": 23_040}
# Entries of a published checkpoint.
ENTRIES = {
    "vitae_tiny": 264, "vitae_6m": 348, "vitae_13m": 376, "vitae_s": 460,
    "vitae_b": 260, "vitae_l": 512, "vitae_h": 680,
}
NARROW = dict(dims=(8, 16, 256))


def narrow(**kwargs):
    return shallow("vitae_tiny", **dict(dims=(16, 32, 64), embed_dim=8, groups=16, num_heads=2, num_classes=5) | kwargs)


def plain(**kwargs):
    return shallow("vitae_b", **dict(num_classes=5) | kwargs)


def load_published(model, name, wrap=lambda weights: weights):
    model = model.double().eval()
    model.load_state_dict(checkpoint_filter_fn(wrap(published_state_dict(name)), model))
    return model


@pytest.mark.parametrize("name,kwargs", [*((name, {}) for name in STAGES), ("vitae_tiny_narrow", NARROW)])
def test_agrees_with_the_published_network(name, kwargs):
    assert_agrees(load_published(timm.create_model(name.removesuffix("_narrow"), **kwargs), name), name)


def test_the_plain_network_agrees_with_the_published_one():
    """Its only map: the patches after the last cell."""
    model, golden = load_published(timm.create_model("vitae_b"), "vitae_b"), published.golden_tensors("vitae_b")
    with torch.inference_mode():
        features, (last,) = model.forward_intermediates(image(224, 224), indices=1)
        logits = model.forward_head(features)[0]
    assert relative_error(logits, golden["logits"]) < 1e-8
    assert list(last.shape) == list(golden["stage0_shape"])
    assert relative_error(last[0].flatten(1).mean(1), golden["stage0_mean"]) < 1e-8
    assert relative_error(last[0].flatten(1).std(1), golden["stage0_std"]) < 1e-8


@pytest.mark.parametrize("name", COSTS)
def test_parameters(name):
    """Random features are no parameters, and are saved."""
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == COSTS[name][0]
    state = model.state_dict()
    assert len(state) == ENTRIES[name]
    assert sum(w.numel() for name, w in state.items() if name.endswith(".w")) == FEATURES.get(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    *STAGES, "vitae_b", *(pytest.param(name, marks=pytest.mark.long) for name in ("vitae_l", "vitae_h")),
])
def test_flops(name):
    assert gmacs(timm.create_model(name)) == pytest.approx(COSTS[name][1], rel=0.01)


# --- attention by random features -------------------------------------------------------------------------------------


def plain_kernel_attention(query, key, value, w):
    """One token at a time."""
    def features(x):
        return torch.stack([torch.exp(row @ x - x @ x / 2) for row in w]) / math.sqrt(len(w))

    out = torch.empty_like(query)
    for b in range(len(query)):
        keys = [features(k) for k in key[b]]
        for i, q in enumerate(query[b]):
            weights = torch.stack([features(q) @ k for k in keys])
            out[b, i] = (weights[:, None] * value[b]).sum(0) / (weights.sum() + 1e-8)
    return out


def tokens(squared_length=1.0, count=6, dim=8, dtype=torch.float64):
    """Queries, keys and values, (2, count, dim) each, and random features (dim / 2, dim)."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, count, dim, dtype=torch.float64)
    query, key = (math.sqrt(squared_length) * F.normalize(x, dim=-1) for x in (query, key))
    w = KernelAttention(dim, dim).double().w
    return tuple(x.to(dtype) for x in (query, key, value, w))


@pytest.mark.parametrize("squared_length", [1.0, 5.0, 40.0])
def test_kernel_attention(squared_length):
    """Up to where features vanish beside 1e-8."""
    inputs = tokens(squared_length)
    torch.testing.assert_close(kernel_attention(*inputs), plain_kernel_attention(*inputs), rtol=1e-10, atol=1e-14)


def test_kernel_attention_is_softmax_attention_of_many_random_features():
    query, key, value, _ = tokens(count=5, dim=4)
    w = torch.randn(2**20, 4, dtype=torch.float64)
    expected = (query @ key.transpose(1, 2)).softmax(dim=-1) @ value
    torch.testing.assert_close(kernel_attention(query, key, value, w), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("squared_length", [5.0, 31.0, 60.0, 300.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_kernel_attention_in_half_precision_is_that_in_float32(dtype, squared_length, autocast):
    """Of inputs rounded to it: finite for long keys, though 1e-8 and most of their features are zero in float16."""
    half = [x.requires_grad_() for x in tokens(squared_length, count=50, dim=64, dtype=dtype)]
    exact = kernel_attention(*(x.detach().double() for x in half))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = kernel_attention(*half)
    found.float().square().sum().backward()
    assert found.dtype == dtype
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=eps, atol=max(smallest, 1e-6 * exact.abs().max().item()))
    assert all(x.grad.isfinite().all() for x in half[:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_network_stays_finite_in_half_precision_with_long_keys(dtype):
    model = narrow().train()
    for stage in model.stages[:2]:
        torch.nn.init.normal_(stage.downsample.attn.kqv.weight, std=2.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(torch.randn(2, 3, 64, 64)).float().square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def check_features(model):
    for stage in model.stages[:2]:
        w = stage.downsample.attn.w.double()
        torch.testing.assert_close(w @ w.T, len(w) * torch.eye(len(w), dtype=w.dtype), rtol=0, atol=1e-4)


def test_random_features_are_orthogonal_rows_of_one_length():
    model, other = narrow(), narrow()
    check_features(model)
    w = model.stages[1].downsample.attn.w
    assert w.shape == (16, 32) and w.equal(other.stages[1].downsample.attn.w)
    torch.manual_seed(7)
    other.init_weights()
    check_features(other)
    assert not torch.allclose(w, other.stages[1].downsample.attn.w)
    with torch.device("meta"):
        empty = narrow()
    empty.to_empty(device="cpu").init_weights()
    check_features(empty)
    low = narrow(dtype=torch.bfloat16).stages[0].downsample.attn.w
    torch.testing.assert_close((low.float() @ low.float().T).diagonal(), torch.full((8,), 8.0), rtol=0.01, atol=0)


def test_random_features_are_not_trained():
    """Neither by the optimizer nor by the EMA, and another network's come with its weights."""
    model = narrow()
    ema = create_ema(model, 0.9)
    before = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(".w")}
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.5)
    for step in range(3):
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        ema.update(model, step)
    assert len(before) == 2
    for found in (model.state_dict(), ema.module.state_dict()):
        assert all(found[name].equal(value) for name, value in before.items())
    other = narrow()
    torch.manual_seed(5)
    other.init_weights()
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(other.eval()(x), model.eval()(x))
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    assert other(x).equal(model(x))


def test_values_skip_the_attention():
    attn = KernelAttention(12, 8).double().eval()
    for parameter in attn.proj.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 5, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(attn(x), attn.kqv(x)[..., 16:])


# --- cells ------------------------------------------------------------------------------------------------------------


def test_dropout_of_the_reduction_cells_is_fixed():
    """0.1 behind the attention and the MLP, in training alone."""
    for drop_rate in (0.0, 0.4):
        model = narrow(drop_rate=drop_rate)
        dropping = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p}
        head = {"head.drop": drop_rate} if drop_rate else {}
        inner = {f"stages.{i}.downsample.{part}": 0.1 for i in (0, 1) for part in ("attn.drop", "mlp.drop2")}
        assert dropping == head | inner
    x = torch.randn(2, 16, 8, 8)
    cell = narrow().stages[1].downsample.eval()
    assert cell(x).equal(cell(x))
    cell.train()
    found = []
    for module in (cell.attn.drop, cell.mlp.drop2):
        module.register_forward_hook(lambda _, inputs, out: found.append((out == 0).float().mean()))
    for _ in range(20):
        cell(x)
    assert len(found) == 40 and torch.stack(found).mean().item() == pytest.approx(0.1, abs=0.01)


def test_stochastic_depth_is_of_normal_cells():
    model = narrow(depth=4, drop_path_rate=0.3)
    dropping = {name.rpartition(".")[0] for name, m in model.named_modules() if type(m).__name__ == "DropPath"}
    assert dropping == {f"stages.2.blocks.{i}" for i in range(4)}
    assert [block.drop_path2.drop_prob for block in model.stages[2].blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    model = plain(depth=4, drop_path_rate=0.3)
    assert [block.drop_path3.drop_prob for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def constant(cell):
    """A cell whose attention adds 10 and whose convolutions add 1, or what SiLU makes of it."""
    for module in (cell.mlp.fc2, cell.attn.proj):
        torch.nn.init.zeros_(module.weight)
    last = [module for module in cell.pcm if isinstance(module, torch.nn.Conv2d)][-1]
    torch.nn.init.zeros_(last.weight)
    for bias, value in ((cell.mlp.fc2.bias, 0.0), (cell.attn.proj.bias, 10.0), (last.bias, 1.0)):
        torch.nn.init.constant_(bias, value)
    return cell


def test_paths_are_dropped_apart():
    """Attention and convolutions: of many images, some keep one of the two alone."""
    torch.manual_seed(0)
    cell = constant(NormalCell(4, 1, 1, mlp_ratio=2.0, drop_path=0.5)).train()
    found = set(cell(torch.zeros(64, 2, 2, 4))[:, 0, 0, 0].tolist())
    silu = F.silu(torch.tensor(1.0)).item()
    assert sorted(found) == pytest.approx([0.0, 2 * silu, 20.0, 20.0 + 2 * silu])
    cell = constant(PlainCell(4, 1, 1, mlp_ratio=4.0, drop_path=0.5)).train()
    assert set(cell(torch.zeros(64, 7, 4), (2, 3))[:, 1, 0].tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_the_class_token_is_not_convolved():
    cell = constant(PlainCell(4, 1, 1, mlp_ratio=4.0)).eval()
    out = cell(torch.zeros(1, 7, 4), (2, 3))
    assert out[0, :, 0].tolist() == [10.0, *[11.0] * 6]


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,padded", [
    ((64, 64), (64, 64)), ((37, 50), (40, 52)), ((1, 1), (4, 4)), ((3, 227), (4, 228)),
])
def test_images_are_padded_to_multiples_of_4(size, padded):
    """At the bottom and right, and no further."""
    model = narrow(depth=2).double().eval()
    x = image(*size)
    zeros = torch.zeros(1, 3, *padded, dtype=x.dtype)
    zeros[:, :, : size[0], : size[1]] = x
    maps, expected = (model.forward_intermediates(y)[1] for y in (x, zeros))
    assert maps[0].shape[2:] == (padded[0] // 4, padded[1] // 4)
    for a, b in zip(maps, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_odd_sides_of_maps_are_rounded_up():
    model = narrow().double().eval()
    x = image(236, 28)
    assert [y.shape[2:] for y in model.forward_intermediates(x)[1]] == [(59, 7), (30, 4), (15, 2)]
    assert (model(x) - model(F.pad(x, (0, 4, 0, 4)))).abs().max() > 1e-6


@pytest.mark.parametrize("make", [narrow, plain])
@pytest.mark.parametrize("size", [(112, 28), (36, 100)])
def test_an_image_on_its_side(make, size):
    """With kernels that are symmetric, an image and its transpose have the same logits."""
    model = make(depth=2).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data + parameter.data.transpose(2, 3)
        elif name == "pos_embed":
            torch.nn.init.trunc_normal_(parameter, std=0.02)
            grid = parameter.data[:, 1:].unflatten(1, model.grid_size)
            parameter.data[:, 1:] = (grid + grid.transpose(1, 2)).flatten(1, 2)
    x = image(*size)
    torch.testing.assert_close(model(x.transpose(2, 3)), model(x), rtol=1e-6, atol=1e-8)  # timm resamples in float32


@pytest.mark.parametrize("size", [(64, 96), (70, 96)])
def test_convolutions_read_and_write_channels_last(size):
    model = narrow(features_only=True).eval()
    seen = are_channels_last(model, torch.randn(2, 3, *size))
    assert len(seen) == 2 * sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) and all(seen)


def test_positions_are_resampled_for_other_sizes():
    model = plain().eval()
    torch.nn.init.normal_(model.pos_embed)
    for parameter in (model.patch_embed.proj.weight, model.patch_embed.proj.bias):
        torch.nn.init.zeros_(parameter)
    embedded, grid = model._embed(torch.randn(1, 3, 96, 310))
    assert grid == (6, 20)
    torch.testing.assert_close(embedded, resample_abs_pos_embed(model.pos_embed, new_size=(6, 20), old_size=(14, 14)))


# --- the head, the optimizer ------------------------------------------------------------------------------------------


def test_the_mean_of_the_patches_is_normed():
    model = plain().eval()
    features = model.forward_features(x := torch.randn(2, 3, 64, 96))
    expected = F.layer_norm(features[:, 1:].mean(1), (96,), eps=1e-6)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
    torch.testing.assert_close(model(x), model.head.fc(expected))


def test_no_weight_decay_of_the_class_token_and_the_positions():
    model = plain()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for p in groups[1]["params"]}
    assert groups[1]["weight_decay"] == 0.05 and id(model.patch_embed.proj.weight) in decayed
    assert not decayed & {id(model.cls_token), id(model.pos_embed)}


def test_the_last_norm_is_trained_like_the_classifier():
    """With layer decay, as that of timm's vision transformers is."""
    model = plain(depth=3)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert {scales[id(p)] for p in (*model.fc_norm.parameters(), *model.head.parameters())} == {1.0}
    assert {scales[id(p)] for p in model.blocks[2].parameters()} == {0.5}


@pytest.mark.parametrize("make", [narrow, plain])
def test_initial_weights(make):
    model = make()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert not any(m.bias.any() for m in linears)
    assert torch.cat([m.weight.flatten() for m in linears]).std().item() == pytest.approx(0.02, rel=0.02)
    assert make is narrow or not (model.cls_token.any() or model.pos_embed.any())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def published_file(name):
    """As timm's train.py wrote it: the EMA weights, which the published accuracies are of, beside the model's own."""
    ema = {f"module.{k}": v.float() if v.is_floating_point() else v for k, v in published_state_dict(name).items()}
    own = {k: v + 1 for k, v in ema.items()}
    return dict(state_dict=own, state_dict_ema=ema, epoch=299, arch=name, args=argparse.Namespace(lr=5e-4))


@pytest.mark.parametrize("name", ["vitae_tiny", pytest.param("vitae_b", marks=pytest.mark.long)])
def test_pretrained_from_a_published_file(name, tmp_path):
    path = tmp_path / "model_best.pth.tar"
    torch.save(published_file(name), path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    expected = load_published(timm.create_model(name), name).float().state_dict()
    torch.testing.assert_close(timm.create_model(name, **overlay).state_dict(), expected, rtol=0, atol=0)
    other = timm.create_model(name, **overlay, num_classes=5, in_chans=1)
    assert other(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    convs = other.pretrained_cfg["first_conv"]
    for conv in [convs] if isinstance(convs, str) else convs:
        summed = expected[f"{conv}.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(other.state_dict()[f"{conv}.weight"], summed)


def test_published_weights_of_other_classes(tmp_path):
    """As those of ImageNet-22K: the network has as many, and its classifier."""
    file = published_file("vitae_tiny")
    classifier = file["state_dict_ema"]
    for leaf in ("weight", "bias"):
        classifier[f"module.head.{leaf}"] = classifier[f"module.head.{leaf}"][:21].clone()
    torch.save(file, tmp_path / "published.pth")
    overlay = dict(file=str(tmp_path / "published.pth"))
    for kwargs in ({}, dict(num_classes=21)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = timm.create_model("vitae_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        assert model.head.fc.weight.equal(classifier["module.head.weight"])


@pytest.mark.parametrize("name", [*STAGES, "vitae_b"])
@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"state_dict": weights}])
def test_names_not_order_decide(name, wrap):
    model = timm.create_model(name, device="meta")
    weights = published_state_dict(name)
    ours = checkpoint_filter_fn(wrap(weights), model)
    backwards = checkpoint_filter_fn(wrap(dict(reversed(weights.items()))), model)
    assert set(ours) == set(model.state_dict()) == set(backwards)
    assert all(backwards[name] is value for name, value in ours.items())


@pytest.mark.parametrize("name,other", [
    ("vitae_tiny", "vitaev2_s"), ("vitaev2_s", "vitae_tiny"), ("vitae_b", "vitae_s"),
])
def test_weights_of_another_kind_are_refused(name, other):
    model = timm.create_model(name)
    filter_fn = inspect.getmodule(type(model)).checkpoint_filter_fn
    with pytest.raises(MismatchError, match=f"does not fit {name} with 1000 classes: .* is missing"):
        load_weights(model, published_state_dict(other), filter_fn)


def test_weights_for_another_image_size_are_resampled():
    source, target = plain(), plain(img_size=(96, 160))
    torch.nn.init.normal_(source.pos_embed)
    state = checkpoint_filter_fn(source.state_dict(), target)
    expected = resample_abs_pos_embed(source.pos_embed, new_size=(6, 10), old_size=(14, 14))
    torch.testing.assert_close(state["pos_embed"], expected.detach())
    target.load_state_dict(state)
    x = torch.randn(1, 3, 96, 160)
    torch.testing.assert_close(target.eval()(x), source.eval()(x))
    with pytest.raises(ValueError, match="60 positions are no square grid"):
        checkpoint_filter_fn(target.state_dict(), source)


def test_published_positions_are_of_a_square_grid():
    """Also where a network has as many of another one."""
    weights = published_state_dict("vitae_b")
    wide = timm.create_model("vitae_b", img_size=(112, 448), device="meta")
    found = checkpoint_filter_fn(weights, wide)["pos_embed"]
    published = weights["layers.0.RC.pos_embed"]
    assert found.shape == published.shape
    torch.testing.assert_close(found, resample_abs_pos_embed(published, new_size=(7, 28), old_size=(14, 14)))
    own = checkpoint_filter_fn({"pos_embed": published}, wide)
    assert own["pos_embed"] is published
    square = checkpoint_filter_fn(weights, timm.create_model("vitae_b", device="meta"))
    assert square["pos_embed"] is published


def test_our_own_checkpoints_pass_the_filter_unchanged():
    for model in (narrow(), plain()):
        state = model.state_dict()
        assert checkpoint_filter_fn(state, model) is state


@pytest.mark.parametrize("make,kwargs,message", [
    (narrow, dict(dims=(16, 32)), "dims must have one entry for each of the 3 stages"),
    (narrow, dict(dims=(16, 32, 64.0)), "dims must be a whole number, got 64.0"),
    (narrow, dict(dims=(1, 32, 64)), "dims must be at least 2, got 1"),
    (narrow, dict(dims=(16, 32, 65)), r"the last of dims must be even, for its two dilations, got \(16, 32, 65\)"),
    (narrow, dict(num_heads=3), "num_heads must divide the cells' channels 64, got 3"),
    (narrow, dict(groups=3), "groups must divide the cells' channels 64, got 3"),
    (narrow, dict(groups=64, mlp_ratio=1.5), "groups must divide the convolutions' hidden channels 96, got 64"),
    (narrow, dict(groups=16.0), "groups must be a whole number, got 16.0"),
    (narrow, dict(embed_dim=0), "embed_dim must be at least 1, got 0"),
    (narrow, dict(depth=-1), "depth must be at least 0, got -1"),
    (narrow, dict(mlp_ratio=0), "mlp_ratio must be a positive number, got 0"),
    (narrow, dict(mlp_ratio=0.001), "groups must divide the convolutions' hidden channels 0, got 16"),
    (narrow, dict(drop_path_rate="0.1"), "drop_path_rate must be a number from 0 to 1, got '0.1'"),
    (narrow, dict(output_stride=32), "output_stride of ViTAE must be 16, got 32"),
    (plain, dict(output_stride=16), "output_stride of PlainViTAE must be left out"),
    (plain, dict(num_heads=5), "num_heads must divide the cells' channels 96, got 5"),
    (plain, dict(groups=7), "groups must divide the cells' channels 96, got 7"),
    (plain, dict(global_pool="map"), "global_pool must be one of"),
    (plain, dict(img_size=0), "img_size must be at least 1, got 0"),
    (plain, dict(in_chans=0), "in_chans must be at least 1, got 0"),
])
def test_mistakes_are_named(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
