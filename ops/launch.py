"""Launching Triton kernels at little cost to the host.

A training step of many small layers is bound by its launches. At each launch Triton binds and specialises every
argument again, which takes several times as long as the launch itself. Here the compiled kernel is looked up by
everything that its specialisation can depend on.
"""
import torch

_MOST = 4096  # launches remembered: maps of ever new sizes must not fill the memory
_compiled: dict[tuple, tuple] = {}


def _specialisation(arguments: tuple) -> list:
    """What a kernel is compiled for: tensors' types and alignment; numbers may be 1 or aligned: themselves."""
    return [(x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x for x in arguments]


def launch(kernel, programs: int, arguments: tuple, constants: dict):
    """Launch `programs` programs of a kernel on the device of its first argument, on the current stream.

    Launches are told apart by which `constants` they pass, not by what these hold, since that takes longer than to
    launch: callers keep one dict for each kind of launch.

    Args:
        kernel: A function decorated with `triton.jit`.
        programs: Size of the one-dimensional grid.
        arguments: What comes before the kernel's constants, in its order: tensors, numbers, tuples of numbers.
        constants: Its constants and launch options by name. Never changed.
    """
    device = arguments[0].device
    if device.type != "cuda":  # the interpreter
        kernel[(programs,)](*arguments, **constants)
    elif device.index == torch.cuda.current_device():
        _launch(kernel, programs, arguments, constants, device.index)
    else:  # Triton launches on the current device
        with torch.cuda.device(device):
            _launch(kernel, programs, arguments, constants, device.index)


def _launch(kernel, programs: int, arguments: tuple, constants: dict, device: int):
    key = (kernel.fn, device, id(constants), *_specialisation(arguments))
    known = _compiled.get(key)
    if known is not None:
        compiled, rest, _ = known
        compiled[(programs, 1, 1)](*arguments, *rest)
        return
    compiled = kernel[(programs,)](*arguments, **constants)
    if len(_compiled) >= _MOST:
        _compiled.clear()
    # Held, so that no other dict takes its place in memory, and with it its id.
    _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments):]), constants
