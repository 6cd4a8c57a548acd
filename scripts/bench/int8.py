"""Accuracy and routes of a classifier in 8-bit integers, by each quantizer and beside float32."""
import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.exporting import int8, programs, runtimes
from scripts.exporting.check import Agreement
from scripts.exporting.source import Source

from .timing import Trial

FLOAT32 = "float32"
BATCH = 25
# A batch (B, 3, H, W) -> logits (B, classes), and by routed layer the routes (B, R, top-k).
Routed = Callable[[torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]]


class _Routes(TorchDispatchMode):
    """Keeps the indices of every `topk` that runs within: what a routed layer chooses its regions by.

    Where it takes all regions there is no choice, and files of other runtimes leave it out.
    """

    def __init__(self):
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.topk.default and args[1] < args[0].shape[-1]:
            self.kept.append(result[1])
        return result


def of_torch(network: nn.Module) -> Routed:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with _Routes() as routes:
            logits = network(x)
        return logits, routes.kept

    return run


def of_onnx(file: Path) -> Routed:
    import onnx

    model = onnx.load(file)
    routes = [node.output[1] for node in model.graph.node if node.op_type == "TopK"]
    for name in routes:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    session = runtimes.onnx_session(model.SerializeToString())

    def run(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits, *kept = map(torch.from_numpy, session.run(["logits", *routes], {"images": x.numpy()}))
        return logits, kept

    return run


def of_openvino(model) -> Routed:
    model.add_outputs([node.output(1) for node in model.get_ordered_ops() if node.get_type_name() == "TopK"])
    compiled = runtimes.compile_openvino(model)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits, *kept = (torch.from_numpy(value.copy()) for value in compiled(x.numpy()).values())
        return logits, kept

    return run


def _batches_for(images: torch.Tensor):
    """What `onnxruntime.quantization` takes its calibration images from."""
    from onnxruntime.quantization import CalibrationDataReader

    class Batches(CalibrationDataReader):
        left = iter(images.split(1))

        def get_next(self) -> dict | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.numpy()}

    return Batches()


def static_onnx(source: Path, target: Path, images: torch.Tensor):
    """Quantize convolutions too, by the distribution of each input on the images."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    with int8.without_advice():
        quantize_static(
            source, target, _batches_for(images), op_types_to_quantize=["Conv", "MatMul", "Gemm"], per_channel=True,
            weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.Entropy,
        )


def through_onnx(quantize: Callable[[Path, Path], None], source: Source) -> Routed:
    with tempfile.TemporaryDirectory() as folder:
        float32, quantized = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        runtimes.write_onnx(source.network, float32, source.metadata)
        quantize(float32, quantized)
        return of_onnx(quantized)


def through_pt2e(source: Source, images: torch.Tensor, is_dynamic: bool) -> Routed:
    program = programs.export_program(source.network, source.metadata)
    return of_torch(int8.quantize_program(program, images, is_dynamic))


def through_torchao(source: Source, config: str) -> Routed:
    import torchao.quantization

    network = deepcopy(source.network)
    torchao.quantization.quantize_(network, getattr(torchao.quantization, config)())
    return of_torch(network)


def builders(source: Source, images: torch.Tensor) -> dict[str, Callable[[], Routed]]:
    """By quantizer, what prepares the classifier. `images`, (N, 3, H, W), calibrate it."""
    return {
        "ONNX Runtime, dynamic (--int8)": lambda: through_onnx(int8.quantize_onnx, source),
        "ONNX Runtime, static": lambda: through_onnx(partial(static_onnx, images=images), source),
        "OpenVINO, static (--int8)": lambda: of_openvino(
            runtimes.openvino_model(source.network, source.metadata, images)
        ),
        "PyTorch PT2E, static (--int8)": lambda: through_pt2e(source, images, is_dynamic=False),
        "PyTorch PT2E, dynamic": lambda: through_pt2e(source, images, is_dynamic=True),
        "torchao, weights alone": lambda: through_torchao(source, "Int8WeightOnlyConfig"),
        "torchao, dynamic": lambda: through_torchao(source, "Int8DynamicActivationInt8WeightConfig"),
    }


def changed_routes(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[int]:
    """By layer, the query regions whose key regions are not the same, in whatever order; routes are (B, R, top-k)."""
    pairs = zip(found, expected, strict=True)
    return [int((a.sort(-1).values != b.sort(-1).values).any(-1).sum()) for a, b in pairs]


@torch.inference_mode()
def measure(source: Source, calibration: list[Path], photos: list[Path], trial: Trial) -> list[dict]:
    """One row for float32, and one for each quantizer: top-1 accuracy, images whose first class is as in float32, and
    changed routes; or why it failed.
    """
    batches = list(source.batches(photos, BATCH))
    labels = torch.cat([labels for _, labels in batches])

    def outputs(run: Routed) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        return [run(x) for x, _ in batches]

    about = dict(model=source.metadata.model, images=len(photos))
    expected = outputs(of_torch(source.network))
    rows = [dict(about, quantizer=FLOAT32, **_compare(expected, expected, labels))]
    for name, build in builders(source, source.photographs(calibration)).items():
        row = dict(about, quantizer=name)
        with trial.guard(name):
            row.update(_compare(outputs(build()), expected, labels))
        if name in trial.failures:
            row.update(failed=trial.failures[name])
        rows.append(row)
    return rows


def _compare(found: list[tuple], expected: list[tuple], labels: torch.Tensor) -> dict:
    agreement = Agreement()
    agreement.add(*(torch.cat([logits for logits, _ in each]) for each in (found, expected)), labels)
    changed = [changed_routes(a, b) for (_, a), (_, b) in zip(found, expected, strict=True)]
    layers = zip(*(routes for _, routes in expected), strict=True)
    regions = [sum(routes[:, :, 0].numel() for routes in layer) for layer in layers]
    return dict(
        accuracy=agreement.correct / agreement.total, alike=agreement.alike / agreement.total,
        difference=agreement.difference,
        changed_routes=[sum(layer) / total for layer, total in zip(zip(*changed, strict=True), regions, strict=True)],
    )
