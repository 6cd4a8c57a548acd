"""Kernels for what surrounds attention, one file each, as custom operators. They import Triton: load them late."""
