"""Launching Triton kernels at little cost to the host.

A training step of many small layers is bound by its launches. At each launch Triton binds and specialises every
argument again, which takes several times as long as the launch itself. Here the compiled kernel is looked up by
everything that its specialisation can depend on.
"""
import torch

_MOST = 4096  # launches remembered: maps of ever new sizes must not fill the memory
_compiled: dict[tuple, tuple] = {}


def _specialisation(argument):
    """What a kernel is compiled for: type and alignment of a tensor; of a number, which may be 1 or aligned, itself."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument


def launch(kernel, programs: int, args: tuple, constants: dict):
    """Launch `programs` programs of a kernel on the device of its first argument, on the current stream.

    Args:
        kernel: A function decorated with `triton.jit`.
        programs: Size of the one-dimensional grid.
        args: What comes before the kernel's constants, in its order: tensors, numbers, tuples of numbers.
        constants: Its constants and launch options by name.
    """
    device = args[0].device
    if device.type != "cuda":  # the interpreter
        kernel[(programs,)](*args, **constants)
    elif device.index == torch.cuda.current_device():
        _launch(kernel, programs, args, constants, device.index)
    else:  # Triton launches on the current device
        with torch.cuda.device(device):
            _launch(kernel, programs, args, constants, device.index)


def _launch(kernel, programs: int, args: tuple, constants: dict, device: int):
    key = (kernel.fn, device, *constants.values(), *map(_specialisation, args))
    known = _compiled.get(key)
    if known is not None:
        compiled, rest = known
        compiled[(programs, 1, 1)](*args, *rest)
        return
    compiled = kernel[(programs,)](*args, **constants)
    if len(_compiled) >= _MOST:
        _compiled.clear()
    _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args):])
