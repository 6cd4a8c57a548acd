"""The parts of scripts/benchmark.py.

    timing.py       interleaved rounds, device and host time, peak memory, medians and quartiles
    attention.py    the op: routed, dense and flex attention, and the floor of their time
    flex.py         routed attention as a block mask for PyTorch's flex_attention
    models.py       whole models, growing images, and BViT's broad attention
    breakdown.py    where the time of a training step goes
    loader.py       decoding and augmentation on a core
    suite.py        what `all` measures, and the loop over cases
    tables.py       records as Markdown, and the plot
"""
