import pytest
import torch
from torch import nn

from training.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("amp,dtype,scales", [
    ("auto", None, False), ("off", None, False), ("bf16", torch.bfloat16, False), ("fp16", torch.float16, True),
])
def test_what_a_name_means_on_the_cpu(amp, dtype, scales):
    precision = Precision.on(CPU, amp)
    assert precision.amp_dtype == dtype and precision.grad_scaler().is_enabled() == scales
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("native,dtype", [(True, torch.bfloat16), (False, None)])
def test_auto_is_bf16_where_the_gpu_has_it(native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert Precision.on(torch.device("cuda"), "auto").amp_dtype == dtype


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_weights_share_a_layout(channels_last):
    precision = Precision(channels_last=channels_last)
    images, network = precision.arrange(torch.rand(2, 3, 4, 4)), precision.place(nn.Conv2d(3, 8, 2), CPU)
    for tensor in (images, network.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
