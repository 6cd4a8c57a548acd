"""The models as programs for other runtimes: torch.export, both exporters to ONNX, and int8 by torchao."""
import onnxruntime
import pytest
import timm
import torch
import torch.fx.experimental._config as symbolic_shapes

from helpers import families
from helpers.families import FAMILIES

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(torch.__version__ < (2, 11), reason="shown with PyTorch 2.11 and newer"),
]
# Of deeper graphs, which take their time.
DEBIFORMER = pytest.param("debiformer_nano", marks=pytest.mark.long)
# Regions of one token, empty regions, regions that divide the map and regions that do not; odd sides.
SIZES = [(1, 32, 32), (3, 224, 224), (2, 96, 352), (1, 45, 133)]
LEAST, MOST = 32, 2048


def shallow(name, **kwargs):
    """A shallow network without what PyTorch's exporter cannot trace."""
    return families.shallow(name, num_classes=10, **kwargs).eval().requires_grad_(False)


def batch():
    return torch.export.Dim("batch", min=1, max=64)


def any_size():
    sides = {dim: torch.export.Dim(side, min=LEAST, max=MOST) for dim, side in ((2, "height"), (3, "width"))}
    return {0: batch(), **sides}


def assert_runs(run, model, sizes):
    """To float32's rounding. Its seed is one where rounding decides no route: of one image in a few hundred it does."""
    torch.manual_seed(1)
    for count, height, width in sizes:
        x = torch.randn(count, 3, height, width)
        expected = model(x)
        torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def in_onnx_runtime(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biformer_nano", "bvit_5m", DEBIFORMER, "vitae_tiny", "vitae_b", "vitaev2_s"])
def test_torch_export_of_any_size(name):
    """One program for every batch and size, which checks for itself what it was made for."""
    model = shallow(name)
    with symbolic_shapes.patch(backed_size_oblivious=True):
        program = torch.export.export(model, (torch.randn(2, 3, 192, 256),), dynamic_shapes=(any_size(),), strict=False)
    assert not any("routed_attention" in str(node.target) for node in program.graph.nodes)
    assert_runs(program.module(), model, SIZES)


@pytest.mark.long
@pytest.mark.parametrize("name", ["biformer_nano", "debiformer_nano"])
def test_torch_export_of_multiples_of_32(name):
    """By PyTorch's defaults: then sizes have to be above those at which a region is one token wide."""
    model = shallow(name)
    sides = {i: 32 * torch.export.Dim(side, min=least, max=64) for i, side, least in ((2, "rows", 8), (3, "cols", 8))}
    program = torch.export.export(model, (torch.randn(2, 3, 288, 320),), dynamic_shapes=({0: batch(), **sides},),
                                  strict=False)
    run = program.module(check_guards=False)
    assert_runs(run, model, [(2, 256, 256), (1, 448, 320), (3, 256, 352)])


@pytest.mark.long
@pytest.mark.parametrize("name", [*FAMILIES, "biformer_stl"])
def test_exports_to_onnx(name, tmp_path):
    """By the lines of docs/models.md, for any batch and size."""
    model = shallow(name)
    program = torch.onnx.export(model, (torch.randn(2, 3, 192, 256),), dynamo=True, dynamic_shapes=(any_size(),))
    program.save(tmp_path / "model.onnx")
    assert_runs(in_onnx_runtime(tmp_path / "model.onnx"), model, SIZES)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_older_exporter_to_onnx_takes_any_batch(name, padded, tmp_path):
    """It traces, for images of one size."""
    model, size = shallow(name), (96, 64) if padded else (224, 224)
    if padded and families.is_plain(model):
        pytest.skip("resamples positions with antialiasing, which that exporter does not know")
    axes = dict(images={0: "batch"}, logits={0: "batch"})
    torch.onnx.export(model, (torch.randn(2, 3, *size),), tmp_path / "model.onnx", dynamo=False, opset_version=17,
                      input_names=["images"], output_names=["logits"], dynamic_axes=axes)
    assert_runs(in_onnx_runtime(tmp_path / "model.onnx"), model, [(n, *size) for n in (1, 2, 5)])


@pytest.mark.long
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_converts_to_int8(is_dynamic):
    """By torchao's PT2E: a prepared program is calibrated, and converts; no graph within the graph is in its way."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model = timm.create_model("biformer_nano", pretrained=True).eval().requires_grad_(False)
    x = torch.randn(4, 3, 96, 96)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch()},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic))
    prepared = pt2e.prepare_pt2e(program, quantizer)
    prepared(x)
    converted = pt2e.convert_pt2e(prepared)
    assert sum("quantized_decomposed.quantize" in str(node.target) for node in converted.graph.nodes) > 20
    expected = model(x)
    assert (converted(x) - expected).abs().max() < 0.05 * expected.abs().max()
