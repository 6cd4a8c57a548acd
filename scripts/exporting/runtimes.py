"""Files of ONNX and OpenVINO, which run without PyTorch."""
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .int8 import quantize_onnx, quantize_openvino
from .metadata import KEY, Metadata
from .opened import Exported
from .programs import example_of, open_sides


def write_onnx(network: nn.Module, file: Path, metadata: Metadata, images: torch.Tensor | None = None):
    """Of `images` it is only asked whether there are any: in int8, ranges are those of each batch."""
    program = torch.onnx.export(
        network, (example_of(metadata),), dynamo=True, dynamic_shapes=(open_sides(metadata),),
        input_names=["images"], output_names=["logits"], verbose=False,
    )
    program.model.metadata_props[KEY] = metadata.to_json()
    program.save(file)
    if images is not None:
        quantize_onnx(file, file)


def onnx_session(model: Path | bytes):
    """An `onnxruntime.InferenceSession` on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the processor to whatever is next
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_onnx(file: Path) -> Exported:
    session = onnx_session(file)
    metadata = Metadata.from_json(session.get_modelmeta().custom_metadata_map.get(KEY), str(file))
    return Exported(metadata, lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]))


def openvino_model(network: nn.Module, metadata: Metadata, images: torch.Tensor | None = None):
    """An `openvino.Model`, by way of ONNX, whose reader in OpenVINO knows every operator of these networks."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(network, Path(folder, "model.onnx"), metadata)
        model = openvino.convert_model(Path(folder, "model.onnx"))
    return model if images is None else quantize_openvino(model, images)


def compile_openvino(model, precision: str = "f32"):
    """For the CPU, with as many threads as PyTorch has; "bf16" is what OpenVINO chooses where the processor has it."""
    import openvino

    settings = dict(INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=torch.get_num_threads())
    return openvino.compile_model(model, "CPU", settings)


def write_openvino(network: nn.Module, file: Path, metadata: Metadata, images: torch.Tensor | None = None):
    import openvino

    model = openvino_model(network, metadata, images)
    model.set_rt_info(metadata.to_json(), [KEY])
    openvino.save_model(model, file, compress_to_fp16=False)


def open_openvino(file: Path, precision: str = "f32") -> Exported:
    import openvino

    model = openvino.Core().read_model(file)
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
    metadata = Metadata.from_json(text, str(file))
    compiled = compile_openvino(model, precision)
    return Exported(metadata, lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0])))
