"""Where tests run Triton kernels: on a GPU, or in Triton's interpreter where it works."""
import pytest
import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _count_kernel(count_ptr, stop):
    count = 0
    for _ in range(0, stop):
        count += 1
    tl.store(count_ptr, count)


def has_working_device():
    """Interpreters up to Triton 3.6 end a loop by what NumPy from 2.4 on refuses to convert to an integer."""
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    try:
        _count_kernel[(1,)](count, 3)
    except triton.runtime.errors.InterpreterError:
        return False
    return count.item() == 3


needs_working_device = pytest.mark.skipif(
    not has_working_device(), reason="this interpreter of Triton does not work with this NumPy"
)
