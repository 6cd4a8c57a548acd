"""Launching Triton kernels at little cost to the host.

A training step of many small layers is bound by its launches. At each launch Triton binds and specialises every
argument again, which takes several times as long as the launch itself. Here the compiled kernel is looked up by
everything that its specialisation can depend on.
"""
import torch

_MOST = 4096  # launches remembered: maps of ever new sizes must not fill the memory
_compiled: dict[tuple, tuple] = {}


def launch(kernel, programs: int, tensors: tuple, numbers: tuple, constants: dict):
    """Launch `programs` programs of a kernel on the device of its first tensor, on the current stream.

    Launches are told apart by which `constants` they pass, not by what these hold, since to look at that takes longer
    than to launch: callers keep one dict for each kind of launch.

    Args:
        kernel: A function decorated with `triton.jit`, of tensors, numbers and constants in this order.
        programs: Size of the one-dimensional grid.
        tensors: Its tensors, the first on the GPU; others may be None.
        numbers: Its numbers, and tuples of numbers.
        constants: Its constants and launch options by name. Never changed.
    """
    device = tensors[0].device
    if device.type != "cuda":  # the interpreter
        kernel[(programs,)](*tensors, *numbers, **constants)
    elif device.index == torch.cuda.current_device():
        _launch(kernel, programs, tensors, numbers, constants)
    else:  # Triton launches on the current device
        with torch.cuda.device(device):
            _launch(kernel, programs, tensors, numbers, constants)


def _launch(kernel, programs: int, tensors: tuple, numbers: tuple, constants: dict):
    # What a kernel is compiled for: tensors' types and alignment; and numbers, which may be 1 or aligned, themselves.
    kinds = [None if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors]
    key = (kernel.fn, tensors[0].device, id(constants), numbers, *kinds)
    known = _compiled.get(key)
    if known is not None:
        compiled, values, _ = known
        compiled[(programs, 1, 1)](*tensors, *numbers, *values)
        return
    compiled = kernel[(programs,)](*tensors, *numbers, **constants)
    if len(_compiled) >= _MOST:
        _compiled.clear()
    values = tuple(constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
    # The constants are held, so that no other dict takes their place in memory, and with it their id.
    _compiled[key] = compiled, values, constants
