"""scripts/export.py, and scripts/predict.py of what it writes."""
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

from scripts import export, predict
from scripts.exporting import formats
from scripts.exporting.check import UNLABELLED, Agreement
from scripts.exporting.formats import open_exported
from scripts.prediction.names import class_names, label_names

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 11), reason="shown with PyTorch 2.11 and newer")
FILES = dict(onnx="nano.onnx", openvino="nano.xml", torch_export="nano.pt2", torchscript="nano.pt")
# The exporters and the compiler take their time. PyTorch 2.11 cannot leave the batch alone open to one image.
OF_PYTORCH = [pytest.mark.long, pytest.mark.skipif(torch.__version__ < (2, 14), reason="shown with PyTorch 2.14")]
LONG = [pytest.param("openvino", marks=pytest.mark.long),
        *(pytest.param(name, marks=OF_PYTORCH) for name in ("torch_export", "aoti"))]


def run(capfd, script, *arguments):
    code = script.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("name", ["onnx", "torchscript", *LONG])
def test_what_is_written_predicts_as_the_network_does(name, tmp_path, capfd):
    file = tmp_path / FILES.get(name, "nano.pt2")
    code, out, err = run(capfd, export, file, "--format", name, "--batch_size", 3, "--input_size", "96x64")
    assert code == 0, err
    assert re.search(r"nano\.\w+: biformer_nano, 10 classes, float32, \d+\.\d MB; batch left open\n", out)
    assert "\n32 images of 96 x 64: " in out
    assert "the same class first in 32\nfile: " in out and "\nPyTorch: " in out
    assert [path.suffix for path in sorted(tmp_path.iterdir())] in ([file.suffix], [".bin", ".xml"])
    metadata, network = open_exported(file)
    assert (metadata.model, metadata.input_size, metadata.dynamic) == ("biformer_nano", (96, 64), ("batch",))
    assert metadata.class_names[4] == "church" and metadata.mean == (0.485, 0.456, 0.406)
    assert network(torch.zeros(5, 3, 96, 64)).shape == (5, 10)

    photo = "docs/church.jpg"
    code, found, _ = run(capfd, predict, "--model", file, photo, "--num_workers", 0)
    assert code == 0
    assert found == run(capfd, predict, photo, "--input_size", "96x64", "--num_workers", 0)[1]


@pytest.mark.long
@pytest.mark.compile
def test_any_size(tmp_path, capfd):
    file = tmp_path / "nano.onnx"
    sizes = "--dynamic", "batch,size", "--input_size", 64
    code, out, err = run(capfd, export, file, *sizes, "--images", "docs/church.jpg")
    assert code == 0, err
    assert "1 image of 64 x 64: " in out and "1 image of 101 x 139: " in out
    _, network = open_exported(file)
    for size in ((32, 32), (224, 224), (33, 77)):
        assert network(torch.zeros(2, 3, *size)).shape == (2, 10)


def checkpoint_of_a_run(file, task="classification"):
    network = timm.create_model("biformer_nano", num_classes=3, depths=(1, 1, 1, 1))
    said = dict(task=task, model="biformer_nano", model_kwargs=dict(depths=(1, 1, 1, 1)), nb_classes=3, input_size=64,
                crop_pct=0.5, exif_transpose=False)
    torch.save(dict(args=said, classes=["daisy", "rose", "tulip"], model=network.state_dict()), file)
    return file


@pytest.mark.slow
def test_the_checkpoint_of_a_run(tmp_path, capfd):
    checkpoint, file, photo = checkpoint_of_a_run(tmp_path / "best.pth"), tmp_path / "flowers.pt", "docs/church.jpg"
    code, _, err = run(capfd, export, file, "--checkpoint", checkpoint)
    assert code == 0, err
    metadata, _ = open_exported(file)
    assert (metadata.class_names, metadata.input_size) == (["daisy", "rose", "tulip"], (64, 64))
    assert (metadata.crop_pct, metadata.exif_transpose) == (0.5, False)
    found = run(capfd, predict, "--model", file, photo, "--num_workers", 0)[1]
    assert found == run(capfd, predict, "--checkpoint", checkpoint, photo, "--num_workers", 0)[1]


def test_a_segmenter_is_refused(tmp_path, capfd):
    checkpoint = checkpoint_of_a_run(tmp_path / "best.pth", "segmentation")
    code, _, err = run(capfd, export, tmp_path / "x.onnx", "--checkpoint", checkpoint)
    assert code == 1 and f"{checkpoint} is no classifier, but of the task segmentation" in err


@pytest.mark.parametrize(("arguments", "message"), [
    (["x.pt2"], "x.pt2 may be torch_export or aoti; name a --format"),
    (["x.bin"], "x.bin has none of the endings .onnx, .xml, .pt2, .pt; name a --format"),
    (["x.onnx", "--format", "aoti"], "x.onnx: files of aoti end in .pt2"),
    (["x.pt", "--dynamic", "batch,size"], "--dynamic size: torchscript records the network for images of one size"),
    (["nowhere/x.onnx"], "cannot write nowhere/x.onnx: no such folder"),
    (["x.onnx", "--model", "no_such_model"], "no_such_model"),
])
def test_mistakes_are_one_line(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, export, *arguments)
    assert code in (1, 2) and not out
    assert message in err and "Traceback" not in err


def test_a_folder_as_the_file(tmp_path, capfd):
    (tmp_path / "x.onnx").mkdir()
    assert run(capfd, export, tmp_path / "x.onnx")[2].endswith("x.onnx: it is a folder\n")


def test_what_may_be_left_open(capfd):
    with pytest.raises(SystemExit):
        export.main(["x.onnx", "--dynamic", "width"])
    assert "must be of batch, size, or none, got 'width'" in capfd.readouterr().err


def test_a_package_that_is_missing(monkeypatch, capfd):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    assert "onnx needs onnx and onnxscript and onnxruntime: pip install onnx" in run(capfd, export, "x.onnx")[2]


def church_folder(folder, images=4):
    """Photographs of churches where imagenette has them: crops of the one in docs."""
    place = folder / "n03028079"
    place.mkdir(parents=True)
    photo = Image.open("docs/church.jpg")
    for i in range(images):
        photo.crop((8 * i, 0, photo.width, photo.height)).save(place / f"{i}.png")
    return folder


def integers_in(file):
    """Weights of eight bits in a file of ONNX or OpenVINO."""
    if file.suffix == ".onnx":
        import onnx

        model = onnx.load(file)
        return sum(math.prod(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8)
    import openvino

    constants = [node for node in openvino.Core().read_model(file).get_ops() if node.get_type_name() == "Constant"]
    return sum(math.prod(c.shape) for c in constants if c.get_element_type().get_type_name() in ("i8", "u8"))


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("name", [
    "onnx", pytest.param("openvino", marks=pytest.mark.long), pytest.param("aoti", marks=OF_PYTORCH)
])
def test_int8(name, tmp_path, capfd):
    """On photographs of the folder that it was not calibrated on; what it predicts is as in float32."""
    photos, file = church_folder(tmp_path / "photos"), tmp_path / FILES.get(name, "nano.pt2")
    code, out, err = run(capfd, export, file, "--format", name, "--int8", photos, "--batch_size", 2)
    assert code == 0, err
    assert "biformer_nano, 10 classes, int8, " in out
    assert re.search(r"\n2 images of 160 x 160: .*the same class first in 2\n"
                     r"top-1 accuracy: file 100.00 %, PyTorch 100.00 %, of 2 labelled images\n", out)
    metadata, network = open_exported(file)
    assert metadata.precision == "int8" and network(torch.zeros(3, 3, 160, 160)).shape == (3, 10)
    if name != "aoti":
        linear = [m.weight.numel() for m in timm.create_model("biformer_nano").modules() if type(m) is torch.nn.Linear]
        assert integers_in(file) >= sum(linear)
    code, found, _ = run(capfd, predict, "--model", file, "docs/church.jpg", "--num_workers", 0, "--topk", 1)
    assert code == 0 and "church" in found


@pytest.mark.long
@pytest.mark.compile
def test_int8_of_any_size(tmp_path, capfd):
    file = tmp_path / "nano.onnx"
    sizes = "--dynamic", "batch,size", "--input_size", 96
    code, out, err = run(capfd, export, file, *sizes, "--int8", church_folder(tmp_path / "photos"))
    assert code == 0, err
    assert "2 images of 96 x 96: " in out and "2 images of 133 x 171: " in out


def test_photographs_to_calibrate_on_and_to_check(tmp_path):
    """None is in both, where there are two at least; as many folders as there are take part."""
    folder = church_folder(tmp_path / "photos", images=5)
    paths = sorted((folder / "n03028079").iterdir())
    calibration, to_check = export.photographs(SimpleNamespace(int8=folder, images=None))
    assert (calibration, to_check) == (paths[::2], paths[1::2])
    assert export.photographs(SimpleNamespace(int8=folder, images=paths[:1])) == (paths[::2], paths[:1])
    assert export.photographs(SimpleNamespace(int8=paths[0], images=None)) == (paths[:1], paths[:1])
    assert export.photographs(SimpleNamespace(int8=None, images=None)) == ([], [])
    assert export.spread(list("abcdefghij"), 3) == ["a", "d", "g"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["x.pt"], "--int8: torchscript is written in float32 only; formats in int8 are onnx, openvino, aoti"),
    (["x.pt2", "--format", "torch_export"], "--int8: torch_export is written in float32 only"),
    (["x.onnx"], "nowhere: no such file or folder"),
])
def test_mistakes_of_int8(arguments, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, export, *arguments, "--int8", "nowhere")
    assert code in (1, 2) and not out
    assert message in err and "Traceback" not in err


def test_a_quantizer_that_is_missing(monkeypatch, capfd):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == "nncf" else name)
    assert "openvino needs nncf: pip install nncf" in run(capfd, export, "x.xml", "--int8", "photos")[2]


def test_when_a_file_agrees():
    expected = torch.eye(10) * 3
    agreement = Agreement()
    agreement.add(expected + 1e-3, expected, torch.tensor([0, 2, *[UNLABELLED] * 8]))
    assert agreement.holds("float32") and agreement.difference == pytest.approx(1e-3, rel=1e-3)
    assert (agreement.labelled, agreement.accuracy, agreement.accuracy_before) == (2, 50, 50)
    agreement.add(expected.roll(1, 0)[:1], expected[:1], torch.tensor([UNLABELLED]))
    assert not agreement.holds("float32")
    assert agreement.alike == 10 and agreement.holds("int8")  # 10 of 11
    agreement.add(expected.roll(1, 0)[:1], expected[:1], torch.tensor([UNLABELLED]))
    assert not agreement.holds("int8")


def test_what_an_exporter_cannot_follow_is_one_line(tmp_path, capfd, monkeypatch):
    def write(*_):
        raise ValueError("no\nsuch operator")

    monkeypatch.setitem(formats.FORMATS, "torchscript", replace(formats.FORMATS["torchscript"], write=write))
    code, _, err = run(capfd, export, tmp_path / "nano.pt", "--input_size", 64)
    assert code == 1 and "cannot export biformer_nano as torchscript: no such operator\n" in err
    assert list(tmp_path.iterdir()) == []


def test_the_first_image_is_also_tried_alone():
    sizes = []

    def run(x):
        sizes.append(len(x))
        return x.flatten(1)

    batches = [(torch.rand(3, 3, 1, 1), torch.tensor([0, 1, UNLABELLED])), (torch.rand(2, 3, 1, 1), torch.zeros(2))]
    agreement = export.check.compare(torch.nn.Flatten(), run, batches)
    assert sizes == [1, 2, 2] and (agreement.total, agreement.labelled, agreement.difference) == (5, 4, 0)


@pytest.mark.slow
@pytest.mark.compile
def test_a_file_that_refuses_one_image(tmp_path, capfd):
    """PyTorch notes of channels-last convolutions, as in timm's ConvNeXt, that the batch is more than one."""
    weights, file = tmp_path / "weights.pth", tmp_path / "convnext.pt2"
    flags = "--checkpoint", weights, "--model", "convnext_atto", "--input_size", 64, "--format", "torch_export"
    torch.save(timm.create_model("convnext_atto").state_dict(), weights)
    code, _, err = run(capfd, export, file, *flags)
    assert code == 1 and f"{file} does not take images of 1 x 3 x 64 x 64: " in err and "Traceback" not in err
    code, _, err = run(capfd, predict, "--model", file, "docs/church.jpg", "--num_workers", 0)
    assert code == 1 and f"{file} does not take images of 1 x 3 x 64 x 64: " in err and "Traceback" not in err
    assert run(capfd, export, file, *flags, "--dynamic", "none")[0] == 0


def test_logits_that_are_no_numbers_do_not_agree():
    found = torch.tensor([[1.0, math.nan]])
    agreement = Agreement()
    agreement.add(found, torch.ones(1, 2), torch.tensor([UNLABELLED]))
    agreement.add(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([UNLABELLED]))
    assert agreement.difference == math.inf and not agreement.holds("float32")


def test_names_of_folders_and_of_classes():
    nano = timm.create_model("biformer_nano", pretrained=True)
    assert (label_names({}, nano)[4], class_names({}, nano)[4]) == ("n03028079", "church")
    imagenet = timm.create_model("resnet10t")
    assert label_names({}, imagenet)[497] == "n03028079" and class_names({}, imagenet)[497].startswith("church")
    flowers = timm.create_model("biformer_nano", num_classes=2)
    for names in (label_names, class_names):
        assert names(dict(classes=["daisy", "rose"]), flowers) == ["daisy", "rose"]
        assert names({}, flowers) == ["0", "1"]


def test_a_file_that_differs_is_told(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(export.check, "compare", lambda *_: Agreement(0.1, 2.0, 3, 32))
    file = tmp_path / "nano.pt"
    code, _, err = run(capfd, export, file, "--input_size", 64)
    assert code == 1 and f"{file} does not compute what PyTorch does" in err and file.exists()


@pytest.mark.parametrize("name", ["x.onnx", "x.xml", "x.pt2", "x.pt"])
def test_predict_refuses_what_is_no_such_file(name, tmp_path, capfd):
    assert "no such file" in run(capfd, predict, "--model", tmp_path / name, "docs/church.jpg")[2]
    (tmp_path / name).write_bytes(b"not a network")
    code, _, err = run(capfd, predict, "--model", tmp_path / name, "docs/church.jpg", "--num_workers", 0)
    assert code == 1 and f"{name} cannot be read: " in err and "Traceback" not in err


def test_predict_refuses_files_of_others(tmp_path, capfd):
    file = tmp_path / "other.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 4, 4)), file)
    code, _, err = run(capfd, predict, "--model", file, "docs/church.jpg", "--num_workers", 0)
    assert code == 1 and "was not written by scripts/export.py" in err


@pytest.mark.parametrize("flag", ["--input_size 64", "--nb_classes 10", "--device cuda", "--amp bf16"])
def test_predict_refuses_flags_that_the_file_has_settled(flag, capfd):
    with pytest.raises(SystemExit):
        predict.main(["--model", "x.onnx", "docs/church.jpg", *flag.split()])
    assert flag.split()[0] in capfd.readouterr().err
