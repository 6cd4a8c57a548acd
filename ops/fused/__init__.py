"""Layers around attention, fused for GPUs; each is chosen where it was measured to be faster."""
