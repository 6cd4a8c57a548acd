"""timm's contract, for every model that this repository registers."""
import copy
import inspect

import pytest
import timm
import torch
from timm.layers import get_channel_dim
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2, param_groups_layer_decay

import models
from helpers import ROOT
from helpers.families import FAMILIES, SMALLEST, is_plain, shallow
from tasks import networks

ALIASES = {"debi_tiny", "debi_small", "debi_base"}
OURS = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("models.")}
NAMES = sorted(OURS - ALIASES)
# Their weights are in the repository.
SHIPPED = {SMALLEST, "debiformer_nano"}


# Of the others, what leaves them few blocks.
SMALLER = {
    "bvit_22m": {}, "vitae_6m": dict(depth=4), "vitae_13m": dict(depth=4), "vitae_s": dict(depth=4),
    "vitae_b": dict(depth=5, embed_dim=192), "vitae_l": dict(depth=5, embed_dim=256),
    "vitae_h": dict(depth=5, embed_dim=320),
}


def create(name, **kwargs):
    """A network; all but the smallest of each family with few blocks, or with narrow ones where all are wide.

    What the contract asks for takes their heads and kinds of stages, and no more. Tests of the published networks and
    of their costs build them as they are.
    """
    torch.manual_seed(0)
    if name in NAMES and (name not in FAMILIES or name in SMALLER):
        kwargs = SMALLER.get(name, dict(depths=(1, 1, 1, 1))) | kwargs
    return timm.create_model(name, **kwargs)


@pytest.fixture
def fresh_compiler():
    """Without it a size that an earlier test compiled makes the next one dynamic."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def output_fmt(model):
    """Most features are maps; those of plain vision transformers are tokens, as in timm."""
    return getattr(model, "output_fmt", "NCHW")


def channels(model, features):
    return features.shape[get_channel_dim(output_fmt(model))]


def of_the_image(model, features):
    """Features without the class token."""
    return features[:, model.num_prefix_tokens :] if output_fmt(model) == "NLC" else features


def test_every_family_has_its_smallest_network():
    files = {path.stem for path in (ROOT / "models").glob("[a-z]*.py")}
    assert {timm.model_entrypoint(name).__module__.partition(".")[2] for name in FAMILIES} == files


def test_names():
    assert {"biformer_nano", "biformer_tiny", "biformer_small", "biformer_base", "biformer_stl"} <= set(NAMES)
    assert {"bvit_5m", "bvit_22m"} <= set(NAMES) and ALIASES < OURS
    assert {f"vitae_{size}" for size in ("tiny", "6m", "13m", "s", "b", "l", "h")} < set(NAMES)
    offered = (models.BiFormer, models.BViT, models.DeBiFormer, models.ViTAE, models.PlainViTAE, models.ViTAEv2)
    assert tuple(type(create(name)) for name in FAMILIES) == offered


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward(name):
    model = create(name, num_classes=42).train()
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 42) and out.isfinite().all()
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    model = create(name).eval()
    cfg, names = model.default_cfg, set(model.state_dict())
    first_convs = [cfg["first_conv"]] if isinstance(cfg["first_conv"], str) else cfg["first_conv"]
    assert {f"{name}.weight" for name in (cfg["classifier"], *first_convs)} <= names
    x = torch.randn(1, *cfg["input_size"])
    features = model.forward_features(x)
    assert len(features) == 1 and channels(model, features) == model.num_features
    if output_fmt(model) == "NCHW":
        assert features.shape[2:] == cfg["pool_size"]
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model.forward_head(features).shape == (1, cfg["num_classes"])
    assert cfg["num_classes"] == (10 if name in SHIPPED else 1000)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(7, "max")
    assert model(x).shape == (1, 7) and model.get_classifier().out_features == 7 and model.num_classes == 7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (33, 95), (96, 40)])
def test_any_input_size(name, size):
    assert create(name, num_classes=5).eval()(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    model = create(name, features_only=True).eval()
    info = model.feature_info
    assert info.reduction() == ([16, 16, 16] if is_plain(create(name)) else [4, 8, 16, 32][: len(info)])
    for features, width, reduction in zip(
        model(torch.randn(1, 3, 96, 128)), info.channels(), info.reduction(), strict=True
    ):
        assert features.shape == (1, width, 96 // reduction, 128 // reduction)
    some = create(name, features_only=True, out_indices=(0, 2))
    assert [f.shape[1] for f in some(torch.randn(1, 3, 64, 64))] == some.feature_info.channels()
    assert [m.split(".")[1] for m in some.feature_info.module_name()] == ["0", "2"]


@pytest.mark.parametrize("name", NAMES)
def test_forward_intermediates(name):
    model = create(name).eval()
    x = torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    only = model.forward_intermediates(
        x, indices=2, intermediates_only=True, norm=True, output_fmt=output_fmt(model)
    )
    assert len(only) == 2
    torch.testing.assert_close(only[-1], of_the_image(model, final))
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")

    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
    early = pruned.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    for a, b in zip(early, maps[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters()) / 2
    assert channels(pruned, pruned(x)) == pruned.num_features


@pytest.mark.parametrize("name", NAMES)
def test_factory_keywords(name):
    model = create(name, in_chans=1, num_classes=3, global_pool="max", drop_rate=0.2, drop_path_rate=0.3)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 3)
    assert model.head.drop.p == 0.2
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3) and rates == sorted(rates)
    assert create(name, num_classes=0)(torch.randn(2, 3, 64, 64)).shape == (2, model.num_features)
    meta = create(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("name", NAMES)
def test_layer_groups(name):
    model = timm.create_model(name, device="meta")
    groups = timm.models.group_parameters(model, model.group_matcher())
    grouped = [parameter for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(n for n, _ in model.named_parameters())
    assert len(groups) > 6
    assert len(timm.models.group_parameters(model, model.group_matcher(coarse=True))) > len(model.feature_info)
    scales = [group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)]
    assert max(scales) == 1 and min(scales) < 0.02
    create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name):
    model = create(name, num_classes=4).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # the second pass must start from what the first did
    x = torch.randn(2, 3, 64, 64)

    def gradients():
        torch.manual_seed(1)  # of dropout
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    plain = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_reentrant_gradient_checkpointing_trains_everything(name, monkeypatch):
    """timm's switch, by which a part whose input needs no gradient would train nothing."""
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", True)
    model = shallow(name, num_classes=4).train()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_autocast_has_no_nan(name):
    model = create(name, num_classes=4).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 64, 64)).float().square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.compile
@pytest.mark.parametrize("name", [
    SMALLEST, "bvit_5m", "vitae_tiny", "vitae_b",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("biformer_stl", "debiformer_tiny", "vitaev2_s")),
])
def test_compiles_into_one_graph(name, fresh_compiler):
    """Also where sizes change, which torch.compile then takes for symbols: the image's stay numbers."""
    model = shallow(name, num_classes=4).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 3, 96, 64)).sum().backward()
    x = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), model(x))


@pytest.mark.compile
@pytest.mark.parametrize("name", FAMILIES)
def test_export_with_a_dynamic_batch(name):
    model = shallow(name, num_classes=4).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 64, 96)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_fx_feature_extraction(name):
    model = create(name).eval()
    extractor = create_feature_extractor(model, [model.feature_info[1]["module"], "head.fc"])
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(extractor(x)["head.fc"], model(x))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(name):
    model = create(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        alone = torch.func.vmap(lambda image: model(image[None])[0])(x)
        torch.testing.assert_close(alone, model(x), rtol=1e-4, atol=1e-5)


def test_no_other_weights_are_promised_than_can_be_had():
    downloaded = {name for name in timm.list_models(pretrained=True) if name.partition(".")[0] in OURS}
    published = {f"biformer_{kind}.in1k" for kind in ("tiny", "small", "base", "stl", "stl_nchw")}
    assert downloaded == published | {f"{name}.imagenette" for name in SHIPPED}
    assert all(timm.get_pretrained_cfg(name).origin_url.startswith("https://") for name in OURS - SHIPPED)


@pytest.mark.parametrize("name", ["bvit_5m", "debiformer_tiny", "debi_base", "vitae_h", "vitaev2_s.in1k"])
def test_weights_that_no_program_can_download(name):
    with pytest.raises(RuntimeError, match="get them by hand, from .*, https://github.com/.*; pass a file: "
                       r"timm.create_model\(.*pretrained=True, pretrained_cfg_overlay=dict\(file=") as caught:
        create(name, pretrained=True)
    assert "\n" not in str(caught.value)


def test_weights_that_there_are_not():
    with pytest.raises(RuntimeError, match=r"^the weights of vitae_13m were never published; pass a file: timm"):
        create("vitae_13m", pretrained=True)


def test_weights_of_ones_own(tmp_path):
    """In each of timm's ways to name them, though others are shipped."""
    model = create(SMALLEST)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    torch.manual_seed(1)
    for overlay in (dict(file=str(tmp_path / "own.pth")), dict(state_dict=model.state_dict())):
        again = timm.create_model(SMALLEST, pretrained=True, pretrained_cfg_overlay=overlay)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_with_an_average_gives_the_weights_from_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    model, average = create(SMALLEST), create(SMALLEST)
    path = tmp_path / "best.pth"
    torch.save(dict(model=model.state_dict(), model_ema=average.state_dict()), path)
    for overlay in (dict(file=str(path)), dict(url=path.as_uri())):
        again = timm.create_model(SMALLEST, pretrained=True, pretrained_cfg_overlay=overlay)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    again = timm.create_model(SMALLEST, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert again.pretrained_cfg["file"] == str(path) and again.pretrained_cfg["state_dict"] is None


def test_a_checkpoint_of_a_run_with_its_classifier(tmp_path):
    model = create(SMALLEST, num_classes=10)
    torch.save(dict(model=model.state_dict(), epoch=3), tmp_path / "best.pth")
    overlay = dict(file=str(tmp_path / "best.pth"), num_classes=10)
    again = timm.create_model(SMALLEST, num_classes=10, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_a_file_that_is_not_there_or_holds_no_weights(content, tmp_path):
    path = tmp_path / "own.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"own.pth cannot be read as weights") as caught:
        timm.create_model(SMALLEST, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert "\n" not in str(caught.value)


def test_the_hub_of_hugging_face_is_left_to_timm(monkeypatch):
    """Its own cache, and its own errors."""
    model, places = create(SMALLEST), []

    def load(hub_id, *args, cache_dir=None, **kwargs):
        places.append((hub_id, cache_dir))
        return model.state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    again = timm.create_model(SMALLEST, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id="me/nano"))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert places == [("me/nano", None)]


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_name_has_a_data_config(name):
    """The published names too, which main.py takes like any other."""
    is_stages_of_vitae = name in ("vitae_tiny", "vitae_6m", "vitae_13m", "vitae_s")
    assert networks.model_data_config(name)["crop_pct"] == (0.9 if is_stages_of_vitae else 0.875)


WITH_TOKEN_HEAD = ["biformer_nano", "debiformer_tiny", "vitaev2_s"]


def checkpoint_filter(model):
    return inspect.getmodule(type(model)).checkpoint_filter_fn


@pytest.mark.parametrize("name", WITH_TOKEN_HEAD)
def test_token_head(name):
    model, plain = create(name, num_classes=5, token_head=True), create(name, num_classes=5)
    plain.load_state_dict(checkpoint_filter(plain)(model.state_dict(), plain))
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)
    tokens = model.token_head(model.forward_features(x).flatten(2).transpose(1, 2))
    for module in model.modules():
        module.training = isinstance(module, type(model))  # batch norm and dropout stay as in evaluation
    logits, token_logits = model(x)
    torch.testing.assert_close(logits, plain(x))
    torch.testing.assert_close(token_logits, tokens.unflatten(1, (2, 3)))
    model.train()
    sum(y.square().sum() for y in model(x)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", WITH_TOKEN_HEAD)
def test_checkpoints_with_and_without_a_token_head(name):
    model, plain = create(name, num_classes=5, token_head=True), create(name, num_classes=5)
    own = model.token_head.weight.clone()
    model.load_state_dict(checkpoint_filter(model)(plain.state_dict(), model))
    torch.testing.assert_close(model.token_head.weight, own, rtol=0, atol=0)
    torch.testing.assert_close(model.head.fc.weight, plain.head.fc.weight, rtol=0, atol=0)
    of_7 = create(name, num_classes=7, token_head=True).state_dict()
    assert checkpoint_filter(model)(of_7, model)["token_head.weight"].shape == own.shape
    other = {name: value + 1 for name, value in model.state_dict().items()}
    torch.testing.assert_close(checkpoint_filter(model)(other, model), other)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_classifier_is_where_the_network_is_and_of_its_type(name):
    model = shallow(name, num_classes=3, device="meta", dtype=torch.float64)
    model.reset_classifier(0)
    model.reset_classifier(7)
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {("meta", torch.float64)}


def test_reset_classifier_resets_the_token_head():
    model = create(SMALLEST, num_classes=5, token_head=True, dtype=torch.float64)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model.reset_classifier(7)
    assert [y.shape[-1] for y in model(x)] == [7, 7] and model.token_head.weight.dtype == torch.float64
    assert model.token_head.weight.std() < 0.03 and not model.token_head.bias.any()
    model.reset_classifier(0)
    assert [y.shape for y in model(x)] == [(2, model.num_features), (2, 2, 2, model.num_features)]
    groups = timm.models.group_parameters(create(SMALLEST, token_head=True), model.group_matcher())
    assert "token_head.weight" in groups[max(groups)] and "head.fc.weight" in groups[max(groups)]


@pytest.mark.compile
@pytest.mark.long
def test_a_token_head_compiles_into_one_graph(fresh_compiler):
    model = shallow(SMALLEST, num_classes=4, token_head=True).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x := torch.randn(2, 3, 64, 96)), model(x), strict=True):
        torch.testing.assert_close(found, expected)
    assert compiled.eval()(x).shape == (2, 4)
