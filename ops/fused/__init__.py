"""Kernels for what surrounds attention, one file each, as custom operators. Imported by their users: they need Triton."""
