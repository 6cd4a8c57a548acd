"""BiFormer's stages without downsampling, for decoders that ask for finer maps: timm's `output_stride`."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models._backbone import NoMapsError, create_backbone
from models._layers import Downsample
from models._ops import DepthwiseConv


def network(output_stride, name="biformer_nano", **kwargs):
    """With batch norms that do something, in evaluation."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, output_stride=output_stride, **kwargs).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


SMALL_STL = dict(dims=(32, 64, 128, 256), depths=(1, 1, 1, 1))


@pytest.mark.parametrize("output_stride,reductions,dilations", [
    (32, [4, 8, 16, 32], [1, 1, 1, 1]), (16, [4, 8, 16, 16], [1, 1, 1, 2]), (8, [4, 8, 8, 8], [1, 1, 2, 4]),
])
@pytest.mark.parametrize("name,kwargs", [("biformer_nano", {}), ("biformer_stl", SMALL_STL)])
def test_maps_are_of_the_strides_that_are_told(output_stride, reductions, dilations, name, kwargs):
    model = network(output_stride, name, **kwargs)
    assert [info["reduction"] for info in model.feature_info] == reductions
    x = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [y.shape[2:] for y in maps] == [(96 // r, 128 // r) for r in reductions]
    for stage, dilation in zip(model.stages, dilations, strict=True):
        found = {m.dilation for m in stage.modules() if isinstance(m, DepthwiseConv)}
        assert found == {(dilation, dilation)}
    features = timm.create_model(name, features_only=True, output_stride=output_stride, **kwargs)
    assert features.feature_info.reduction() == reductions
    model.train()(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("name,kwargs", [("biformer_nano", {}), ("biformer_stl", SMALL_STL)])
def test_where_maps_are_both_have_the_same_values(output_stride, name, kwargs):
    """With one set of weights, and without attention, which sees more tokens on a finer map."""
    coarse, fine = network(32, name, **kwargs), network(output_stride, name, **kwargs)
    fine.load_state_dict(coarse.state_dict())
    for model in (coarse, fine):
        for stage in model.stages[1:]:
            for block in stage.blocks:
                nn.init.zeros_(block.attn.proj.weight)
    x = torch.randn(2, 3, 128, 96, dtype=torch.float64)
    for a, b in zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (coarse, fine)), strict=True):
        step = b.shape[2] // a.shape[2]
        torch.testing.assert_close(b[..., ::step, ::step], a)
    assert step == 32 // output_stride


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
def test_downsampling_that_keeps_the_size(patchify, dilation):
    torch.manual_seed(0)
    kept, halved = Downsample(4, 6, patchify, stride=1, dilation=dilation).eval(), Downsample(4, 6, patchify).eval()
    assert kept.state_dict().keys() == halved.state_dict().keys()
    kept.load_state_dict(halved.state_dict())
    x = torch.randn(1, 4, 16, 24)
    coarse = x[..., ::dilation, ::dilation]
    torch.testing.assert_close(kept(x)[..., :: 2 * dilation, :: 2 * dilation], halved(coarse))
    assert kept(x).shape == (1, 6, 16, 24)


def test_the_local_terms_of_attention_are_dilated():
    """Each attention of the dilated stages, with its local term computed by PyTorch's convolution beside it."""
    model = network(8)
    for stage, dilation in ((model.stages[2], 2), (model.stages[3], 4)):
        attn = stage.blocks[0].attn
        x = torch.randn(1, 14, 9, attn.proj.in_features, dtype=torch.float64)
        seen = {}
        with torch.no_grad():
            hook = attn.lepe.register_forward_hook(
                lambda module, args, kwargs, out, seen=seen: seen.update(args=args, **kwargs, out=out), with_kwargs=True
            )
            attn(x)
            hook.remove()
        (value,), weight = seen["args"], attn.lepe.weight
        image = F.pad(value.permute(0, 3, 1, 2), (2 * dilation,) * 4)
        local = sum(
            weight[:, 0, i, j, None, None] * image[..., i * dilation :, j * dilation :][..., :14, :9]
            for i in range(5) for j in range(5)
        ) + attn.lepe.bias[:, None, None]
        torch.testing.assert_close(seen["out"], seen["residual"] + local.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name,output_stride,message", [
    ("biformer_nano", 4, "output_stride of BiFormer must be 8 or 16 or 32, got 4"),
    ("biformer_nano", "16", "output_stride of BiFormer must be 8 or 16 or 32, got '16'"),
    ("biformer_nano", 16.0, "output_stride of BiFormer must be 8 or 16 or 32, got 16.0"),
    ("debiformer_nano", 16, "output_stride of DeBiFormer must be 32, got 16"),
    ("vitaev2_s", 8, "output_stride of ViTAEv2 must be 32, got 8"),
    ("bvit_5m", 16, "output_stride of BViT must be left out, .*, got 16"),
])
def test_other_strides_are_refused(name, output_stride, message):
    for features_only in (False, True):
        with pytest.raises(ValueError, match=message):
            timm.create_model(name, output_stride=output_stride, features_only=features_only)


def test_segmenters_and_detectors_need_all_strides():
    with pytest.raises(NoMapsError, match="biformer_nano has maps at strides 4, 8, 16, and a backbone needs"):
        create_backbone("biformer_nano", output_stride=16)


def test_more_stages_than_four_are_not_dilated_unasked():
    model = network(32, dims=(32, 32, 64, 64, 64), depths=(1,) * 5, topk=4)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32, 64]
    assert model.forward_features(torch.randn(1, 3, 128, 128, dtype=torch.float64)).shape[2:] == (2, 2)


@pytest.mark.parametrize("name", ["debiformer_nano", "vitaev2_s"])
def test_what_all_have(name):
    assert timm.create_model(name, output_stride=32).feature_info[-1]["reduction"] == 32
