"""models/segmentation: shapes, parameter counts, the published layout, and UPerNet as in transformers."""
import re

import pytest
import timm
import torch
import torch.nn.functional as F

import models
from helpers.published import published_state_dict
from models.segmentation import (
    HEADS,
    EvalSize,
    Segmenter,
    is_segmenter,
    load,
    load_backbone,
    load_segmenter,
    semantic_fpn,
    upernet,
)
from models.segmentation._heads import AveragePool
from storage.weights import MismatchError, WeightsError

NANO = "biformer_nano"


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=HEADS)
def create(request):
    return HEADS[request.param]


# --- shapes and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height,width", [(64, 96), (32, 32), (97, 70), (45, 131)])
def test_logits_are_at_a_quarter_of_any_size(create, height, width):
    network = create(NANO, num_classes=5).eval()
    with torch.inference_mode():
        logits = network(images(2, 3, height, width))
    assert logits.shape == (2, 5, -(-height // 4), -(-width // 4)) and logits.isfinite().all()
    assert network.num_classes == 5


def test_training_gives_the_logits_of_each_head():
    found = upernet(NANO, num_classes=5).train()(images(2, 3, 64, 96))
    assert {name: tuple(x.shape) for name, x in found.items()} == dict(decode=(2, 5, 16, 24), aux=(2, 5, 4, 6))
    found = semantic_fpn(NANO, num_classes=5).train()(images(2, 3, 64, 96))
    assert {name: tuple(x.shape) for name, x in found.items()} == dict(decode=(2, 5, 16, 24))


BACKBONES = ["vitaev2_s", "debiformer_tiny", "swin_tiny_patch4_window7_224", "resnet18", "convnext_atto"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_with_maps_at_four_strides(name):
    """Of any size, also where timm's classifier is built for one."""
    network = semantic_fpn(name, num_classes=3).eval()
    with torch.inference_mode():
        shape = network(images(1, 3, 70, 100)).shape
        assert shape == (1, 3, 17 if name == "convnext_atto" else 18, 25)  # it rounds down
    parameters = {name for name, _ in network.named_parameters()}
    network.train()(images(2, 3, 64, 64))["decode"].sum().backward()
    unused = {n for n, p in network.named_parameters() if p.grad is None}
    assert parameters and not unused  # as DistributedDataParallel needs it


def test_maps_of_a_padded_image_show_the_image_alone():
    """ViTAEv2 pads to multiples of 32."""
    backbone, x = semantic_fpn("vitaev2_s").eval().backbone, images(1, 3, 70, 100)
    with torch.inference_mode():
        padded = backbone(F.pad(x, (0, 28, 0, 26)))
        for stride, found, of_padded in zip((4, 8, 16, 32), backbone(x), padded, strict=True):
            height, width = -(-70 // stride), -(-100 // stride)
            assert torch.equal(found, of_padded[..., :height, :width])


def test_heads_have_the_published_width_or_the_one_asked_for(create):
    def widths(network):
        return {m.out_channels for m in network.decode_head.modules() if isinstance(m, torch.nn.Conv2d)} - {5}

    assert widths(create(NANO, num_classes=5)) == {512 if create is upernet else 128}
    narrow = create(NANO, num_classes=5, head_channels=24)
    assert widths(narrow) == {24}
    if narrow.auxiliary_head is not None:
        assert narrow.auxiliary_head.conv_seg.in_channels == 12


def test_a_backbone_of_one_stride_is_refused():
    with pytest.raises(ValueError, match=r"deit_tiny_patch16_224 has maps at strides 16, and a backbone needs"):
        upernet("deit_tiny_patch16_224")


def test_extra_norms_are_of_the_maps_alone():
    """What goes on to the next stage is not normed; published for BiFormer and DeBiFormer, and for no other."""
    torch.manual_seed(0)
    backbone = semantic_fpn(NANO).eval().backbone
    for norm in backbone.extra_norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x = images(1, 3, 64, 96)
    plain = backbone.body.forward_intermediates(x, intermediates_only=True)
    for normed, norm, expected in zip(backbone(x), backbone.extra_norms, plain, strict=True):
        expected = F.layer_norm(expected.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, 1e-6)
        torch.testing.assert_close(normed, expected.permute(0, 3, 1, 2))
    assert semantic_fpn("debiformer_tiny").backbone.extra_norms is not None
    assert semantic_fpn("vitaev2_s").backbone.extra_norms is None
    assert semantic_fpn(NANO, extra_norms=False).backbone.extra_norms is None


@pytest.mark.parametrize("side", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(6, 12), (7, 11), (3, 5), (1, 1), (16, 64)])
def test_maps_are_pooled_as_by_pytorch(side, size):
    """Also where bins overlap, and of maps that are smaller than what they are pooled to."""
    x, y = (images(2, 3, *size).double().requires_grad_() for _ in range(2))
    pooled, expected = AveragePool(side)(x), F.adaptive_avg_pool2d(y, side)
    torch.testing.assert_close(pooled, expected)
    weights = images(*expected.shape, seed=1).double()
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("name", [NANO, "debiformer_tiny"])
def test_routed_backbones_have_eight_regions(name):
    def regions(network):
        return {module.num_regions for module in network.modules() if hasattr(module, "num_regions")}

    with torch.device("meta"):
        assert regions(upernet(name)) == {8} and regions(semantic_fpn(name, num_regions=5)) == {5}
        assert regions(timm.create_model(name)) == {7}


@pytest.mark.parametrize("name,shift", [("swin_tiny_patch4_window7_224", 3), ("swinv2_tiny_window8_256", 4)])
@pytest.mark.parametrize("img_size", [None, 160, 512])
def test_windows_shift_in_every_stage(name, shift, img_size):
    """As published: timm leaves the shift out where a map of the size that it is built for is a single window."""
    with torch.device("meta"):
        body = semantic_fpn(name, img_size=img_size).backbone.body
    for stage in body.layers:
        assert [block.shift_size for block in stage.blocks[:2]] == [(0, 0), (shift, shift)]


@pytest.mark.parametrize("head,name,parameters", [
    ("upernet", "vitaev2_s", 49),  # as published
    ("upernet", "swin_tiny_patch4_window7_224", 60),  # Liu et al., https://arxiv.org/abs/2103.14030
    ("upernet", "convnext_tiny", 60),  # Liu et al., https://arxiv.org/abs/2201.03545
])
def test_parameters_are_those_that_papers_list(head, name, parameters):
    with torch.device("meta"):
        network = HEADS[head](name, num_classes=150)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == parameters


# --- heads ------------------------------------------------------------------------------------------------------------


def conv_norm(weights, name, x, kernel=1):
    """A convolution, batch norm in evaluation and ReLU, by their weights."""
    x = F.conv2d(x, weights[f"{name}.conv.weight"], padding=kernel // 2)
    mean, var, weight, bias = (weights[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias).relu()


def randomise(network):
    """Give every weight and statistic a value that matters."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            low = 0.5 if name.endswith(("running_var", "bn.weight")) else -0.2
            value.copy_(torch.rand(value.shape, generator=generator) * 0.4 + low)


def test_semantic_fpn_is_a_pyramid_and_a_sum():
    """By a plain computation with the published names; maps whose sides are no multiples of 8."""
    network = semantic_fpn(NANO, num_classes=5).double().eval()
    randomise(network.neck)
    randomise(network.decode_head)
    sides = [(18, 25), (9, 13), (5, 7), (3, 4)]
    maps = [images(1, c, *size, seed=c).double() for c, size in zip((32, 64, 128, 256), sides, strict=True)]
    weights = network.state_dict()

    def conv(name, x, padding):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    laterals = [conv(f"neck.lateral_convs.{i}.conv", x, 0) for i, x in enumerate(maps)]
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=sides[i - 1], mode="nearest")
    total = 0
    for level, x in enumerate(laterals):
        x = conv(f"neck.fpn_convs.{level}.conv", x, 1)
        for block in range(max(1, level)):
            x = conv_norm(weights, f"decode_head.scale_heads.{level}.{2 * block}", x, 3)
            if level:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + F.interpolate(x, size=sides[0], mode="bilinear", align_corners=False)
    expected = conv("decode_head.conv_seg", total, 0)
    with torch.inference_mode():
        found = network.decode_head(network.neck(maps))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_upernet_is_that_of_transformers():
    """With equal weights equal logits, to 1e-5 in float32; both heads."""
    upernets = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    config = pytest.importorskip("transformers").UperNetConfig(num_labels=5)
    channels = (32, 64, 128, 256)
    network = upernet(NANO, num_classes=5).eval()
    randomise(network.decode_head)
    randomise(network.auxiliary_head)
    maps = [images(2, c, *size) for c, size in zip(channels, [(18, 25), (9, 13), (5, 7), (3, 4)], strict=True)]
    for ours, theirs, inputs in (
        (network.decode_head, upernets.UperNetHead(config, channels), maps),
        (network.auxiliary_head, upernets.UperNetFCNHead(config, channels), maps[2]),
    ):
        renamed = {
            name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): value
            for name, value in ours.state_dict().items()
        }
        theirs.load_state_dict(renamed)
        with torch.inference_mode():
            expected = theirs.eval()(maps)
            found = ours(inputs)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert expected.std() > 0.01


def test_dropout_leaves_out_whole_channels_in_training_alone():
    head = upernet(NANO, num_classes=5).decode_head
    assert head.dropout.p == 0.1 and isinstance(head.dropout, torch.nn.Dropout2d)
    assert head.fpn_bottleneck.conv.bias is None and head.conv_seg.bias is not None
    torch.manual_seed(0)
    x = images(64, 512, 1, 1).abs() + 1
    dropped = head.train().dropout(x.expand(-1, -1, 3, 3)) == 0
    assert (dropped.flatten(2).all(2) == dropped.flatten(2).any(2)).all() and 0.09 < dropped.float().mean() < 0.11


# --- checkpoints ------------------------------------------------------------------------------------------------------


PUBLISHED = {
    "semantic_fpn": r"""
        neck\.(lateral|fpn)_convs\.[0-3]\.conv\.(weight|bias)
        decode_head\.scale_heads\.(0\.0|1\.0|2\.[02]|3\.[024])\.(conv\.weight|bn\.\w+)
        decode_head\.conv_seg\.(weight|bias)""",
    "upernet": r"""
        decode_head\.psp_modules\.[0-3]\.1\.(conv\.weight|bn\.\w+)
        decode_head\.(lateral|fpn)_convs\.[0-2]\.(conv\.weight|bn\.\w+)
        decode_head\.(fpn_)?bottleneck\.(conv\.weight|bn\.\w+)
        decode_head\.conv_seg\.(weight|bias)
        auxiliary_head\.convs\.0\.(conv\.weight|bn\.\w+)
        auxiliary_head\.conv_seg\.(weight|bias)""",
}


@pytest.mark.parametrize("head", HEADS)
def test_modules_are_named_as_published(head):
    patterns = [re.compile(line.strip()) for line in PUBLISHED[head].strip().splitlines()]
    names = [name for name in HEADS[head](NANO).state_dict() if not name.startswith("backbone.")]
    assert all(any(pattern.fullmatch(name) for pattern in patterns) for name in names)
    assert all(any(pattern.fullmatch(name) for name in names) for pattern in patterns)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biformer_small", "debiformer_small", "vitaev2_s"])
def test_a_published_segmenter_is_loaded(name):
    """`backbone.` and the classifier's published names, through the family's own renaming; each tensor arrives."""
    classifier = {k: v.float() if v.is_floating_point() else v for k, v in published_state_dict(name).items()}
    of_backbone = {k: v for k, v in classifier.items() if not re.match(r"norm\.|head|fc|classifier", k)}
    network = semantic_fpn(name, num_classes=7)
    heads = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in network.state_dict().items()
             if not k.startswith("backbone.body.")}
    published = {f"backbone.{k}": v for k, v in of_backbone.items()} | heads
    assert is_segmenter(published) and not is_segmenter(of_backbone)
    assert not load_segmenter(network, published)
    found, expected = network.state_dict(), timm.create_model(name)
    expected.load_state_dict(models.family_filter(expected)(dict(classifier), expected))
    for key, value in expected.state_dict().items():
        if f"backbone.body.{key}" in found:
            assert torch.equal(found[f"backbone.body.{key}"], value), key
    assert all(torch.equal(found[key], value) for key, value in heads.items())
    with pytest.raises(MismatchError, match=r"a segmenter on \w+ with 7 classes: backbone\.body\.st\S* is missing"):
        load_segmenter(network, heads)


def test_our_own_weights_pass_unchanged_and_classifiers_can_be_left(create):
    source, target = create(NANO, num_classes=7), create(NANO, num_classes=7)
    assert not load_segmenter(target, source.state_dict())
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    other = create(NANO, num_classes=4)
    with pytest.raises(MismatchError, match="conv_seg"):
        load_segmenter(other, source.state_dict())
    assert load_segmenter(other, source.state_dict(), new_classes=True)
    assert all(
        torch.equal(value, other.state_dict()[name])
        for name, value in source.state_dict().items() if "conv_seg" not in name
    )


def test_a_segmenter_without_its_auxiliary_head_is_loaded():
    source, target = upernet(NANO, num_classes=7), upernet(NANO, num_classes=7)
    weights = {name: x for name, x in source.state_dict().items() if not name.startswith("auxiliary_head")}
    assert not load_segmenter(target, weights)
    assert torch.equal(source.decode_head.conv_seg.weight, target.decode_head.conv_seg.weight)


def test_a_classifier_is_loaded_into_the_backbone():
    classifier, network = timm.create_model(NANO, num_classes=3), upernet(NANO)
    loaded, left_out, new = load_backbone(network, classifier.state_dict())
    body = network.backbone.body.state_dict()
    assert loaded == f"{len(body)} tensors of the backbone are loaded"
    assert left_out == "not needed, and left out: norm (5), head (2)"
    assert re.fullmatch(r"not there, and newly initialised: backbone\.extra_norms \(8\), decode_head \(74\), "
                        r"auxiliary_head \(8\)", new)
    assert all(torch.equal(value, classifier.state_dict()[name]) for name, value in body.items())


@pytest.mark.parametrize("other", ["biformer_tiny", "resnet18", "debiformer_tiny"])
def test_another_networks_weights_are_refused(other):
    """Also those of a larger network, which has all layers of the smaller and more."""
    with pytest.raises(MismatchError, match=r"does not fit biformer_nano: "):
        load_backbone(upernet(NANO), timm.create_model(other).state_dict())
    deeper = timm.create_model(NANO, depths=(1, 1, 4, 1)).state_dict()
    with pytest.raises(MismatchError, match=r"stages\.2\.blocks\.3\.\S+ is unknown"):
        load_backbone(upernet(NANO), deeper)


def test_windows_of_a_small_classifier_are_taken_over():
    """A Swin that was trained at 64 pixels has windows of 2 in its last stage, where ours has 7."""
    small = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=24, num_classes=3)
    network = semantic_fpn("swin_tiny_patch4_window7_224", embed_dim=24)
    load_backbone(network, small.state_dict())
    with torch.inference_mode():
        assert network.eval()(images(1, 3, 64, 96)).isfinite().all()


@pytest.mark.parametrize("wrapped", [lambda weights: weights, lambda weights: dict(state_dict=weights, meta={})])
def test_a_published_segmenter_is_loaded_by_the_name_of_its_backbone(create, tmp_path, wrapped):
    """Its weights show the head, its width and the classes."""
    source = create(NANO, num_classes=5, head_channels=24).eval()
    weights = {name.replace("backbone.body.", "backbone."): value for name, value in source.state_dict().items()}
    torch.save(wrapped(weights), tmp_path / "p.pth")
    network, transform = load(tmp_path / "p.pth", model=NANO)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())
    assert not network.training and network.classes is None and transform.size == EvalSize()
    with pytest.raises(WeightsError, match=r"p\.pth does not say which model its backbone is; name it: load\("):
        load(tmp_path / "p.pth")
    with pytest.raises(WeightsError, match="timm knows no model 'nano'"):
        load(tmp_path / "p.pth", model="nano")


def test_a_published_segmenter_with_a_head_that_is_not_known(tmp_path):
    weights = {"decode_head.conv_seg.weight": torch.zeros(3, 8, 1, 1), "backbone.stem.weight": torch.zeros(1)}
    torch.save(weights, tmp_path / "p.pth")
    with pytest.raises(WeightsError, match=r"p\.pth has a head other than upernet and semantic_fpn"):
        load(tmp_path / "p.pth", model=NANO)


def test_arguments_that_a_backbone_does_not_take_are_one_line(tmp_path):
    said = dict(task="segmentation", head="semantic_fpn", model=NANO, model_kwargs=dict(depth=3), short_side=64,
                long_side=64, test_rounding="none")
    torch.save(dict(model=semantic_fpn(NANO).state_dict(), args=said), tmp_path / "c.pth")
    with pytest.raises(WeightsError, match=r"c\.pth: biformer_nano cannot be built: .*'depth'"):
        load(tmp_path / "c.pth")


def test_state_survives_a_file(tmp_path):
    network = semantic_fpn(NANO, num_classes=3)
    assert isinstance(network, Segmenter)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    again = semantic_fpn(NANO, num_classes=3)
    again.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    x = images(1, 3, 64, 64)
    assert torch.equal(network.eval()(x), again.eval()(x))
