"""Files of ONNX and OpenVINO, which run without PyTorch."""
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .metadata import KEY, Metadata
from .opened import Exported
from .programs import example_of, open_sides


def write_onnx(network: nn.Module, file: Path, metadata: Metadata):
    program = torch.onnx.export(
        network, (example_of(metadata),), dynamo=True, dynamic_shapes=(open_sides(metadata),),
        input_names=["images"], output_names=["logits"], verbose=False,
    )
    program.model.metadata_props[KEY] = metadata.to_json()
    program.save(file)


def open_onnx(file: Path) -> Exported:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the processor to whatever is next
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    metadata = Metadata.from_json(session.get_modelmeta().custom_metadata_map.get(KEY), str(file))
    return Exported(metadata, lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]))


def write_openvino(network: nn.Module, file: Path, metadata: Metadata):
    """By way of ONNX, whose reader in OpenVINO knows every operator of these networks."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(network, Path(folder, "model.onnx"), metadata)
        model = openvino.convert_model(Path(folder, "model.onnx"))
        model.set_rt_info(metadata.to_json(), [KEY])
        openvino.save_model(model, file, compress_to_fp16=False)


def open_openvino(file: Path) -> Exported:
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
    metadata = Metadata.from_json(text, str(file))
    # In float32, where it would choose bfloat16 by the processor.
    settings = dict(INFERENCE_PRECISION_HINT="f32", INFERENCE_NUM_THREADS=torch.get_num_threads())
    compiled = core.compile_model(model, "CPU", settings)
    return Exported(metadata, lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0])))
