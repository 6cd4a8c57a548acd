"""The parts of scripts/benchmark.py.

    timing.py       interleaved rounds, device and host time, memory, medians and quartiles
    trial.py        one task's time and failures: what goes wrong with a contender stays with that contender
    session.py      tasks in a process of their own, under a time budget; the record that survives a kill
    ceilings.py     what the machine can do: bytes copied and operations multiplied in a second
    attention.py    the op: routed attention against dense and flex attention, and their floor
    flex.py         routed attention as a block mask for PyTorch's flex_attention
    networks.py     whole models, inference and training
    growth.py       cost an image as images grow
    breakdown.py    where a training step's time goes
    suite.py        what `all` measures, on a GPU and on the CPU
    goals.py        what the results are held to
    tables.py       results as Markdown
    plot.py         results as a picture
"""
