"""Dense attention by PyTorch's fused operator, and where a CPU computes it in float32."""
import pytest
import torch
import torch.nn.functional as F

from ops import dense_attention


def make_inputs(keys, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 17, 8), (2, 3, keys, 8), (2, 3, keys, 8), (1, 3, 17, keys))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_training_in_low_precision_on_a_cpu_computes_in_float32(dtype, autocast, with_bias):
    """As PyTorch's gradients in 16 bits are slow there: the result and the gradients are float32's, rounded."""
    inputs = make_inputs(49, torch.float32 if autocast else dtype)[:3 + with_bias]
    upstream = torch.randn(2, 3, 17, 8).to(dtype)
    expected = F.scaled_dot_product_attention(*(x.float() for x in inputs), scale=0.3).to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = dense_attention(*inputs, scale=0.3)
    assert out.dtype == dtype and torch.equal(out, expected)
    wanted, found = (torch.autograd.grad(x, inputs, upstream) for x in (expected, out))
    for ours, exact in zip(found, wanted, strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("trains,keys", [(False, 49), (True, 300)])
def test_otherwise_it_is_pytorchs(trains, keys):
    inputs = make_inputs(keys, torch.bfloat16)
    with torch.set_grad_enabled(trains):
        out = dense_attention(*inputs, scale=0.3)
        assert torch.equal(out, F.scaled_dot_product_attention(*inputs, scale=0.3))
    assert out.requires_grad == trains
