"""Interleaved timing on any device, the memory a call takes, and medians with their spread."""
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import timm
import torch

from .trial import Trial

# Calls before the first that counts: on a GPU the first few compile, choose algorithms and raise the clocks.
WARMUP = {"cuda": 3, "cpu": 1}
# `torch.cuda._sleep` counts cycles of the multiprocessors' clock, which runs at 2 GHz at most.
CLOCK_HZ = 2e9
LONGEST_SLEEP = 0.2
# One sample of a fast call lasts at least this long, so that what surrounds it does not count.
LEAST_SAMPLE_SECONDS = 0.05
# Rotate inputs through this many times the cache, so that no call finds its own there.
CACHES = 4
CPU_CACHE_BYTES = 8 * 2**20


def machine(device: torch.device) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable, device: torch.device) -> float:
    """Seconds of one call, until its last result is there."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def warm(run: Callable, device: torch.device):
    """Call a contender until it runs as it will go on running."""
    for _ in range(WARMUP[device.type]):
        timed(run, device)


def once_each(contenders: dict[str, Callable], trial: Trial) -> dict[str, float]:
    """Seconds of one call of each contender that has not failed."""
    seconds = {}
    for name, run in contenders.items():
        if name not in trial.failures:
            with trial.guard(name):
                seconds[name] = timed(run, trial.device)
    return seconds


def rounds_for(seconds_per_round: float, trial: Trial) -> int:
    """As many rounds as this trial's time allows, within its bounds."""
    affordable = trial.left() / max(seconds_per_round, 1e-9)
    return int(min(max(affordable, trial.least_rounds), trial.most_rounds))


def _order(contenders: dict[str, Callable], trial: Trial, turn: int) -> list[str]:
    """Who runs after whom changes from round to round."""
    names = [name for name in contenders if name not in trial.failures]
    turn = turn % max(len(names), 1)
    return names[turn:] + names[:turn]


def interleave(contenders: dict[str, Callable], trial: Trial) -> dict[str, list[float]]:
    """Seconds of each contender in each round, host time until the results are there.

    Contenders are warm. A sample of a fast one is the mean of several calls in a row.
    """
    once = once_each(contenders, trial)
    repeats = {name: max(1, round(LEAST_SAMPLE_SECONDS / s)) for name, s in once.items()}
    if trial.device.type == "cpu":
        repeats = dict.fromkeys(once, 1)
    rounds = rounds_for(sum(once[name] * repeats[name] for name in once), trial)
    seconds = {name: [] for name in once}
    for turn in range(rounds):
        for name in _order(contenders, trial, turn):
            def several(run=contenders[name], calls=repeats[name]):
                for _ in range(calls):
                    run()

            with trial.guard(name):
                seconds[name].append(timed(several, trial.device) / repeats[name])
    return {name: samples for name, samples in seconds.items() if name not in trial.failures}


def interleave_queued(contenders: dict[str, Callable], trial: Trial) -> tuple[dict[str, list], dict[str, list]]:
    """Seconds on the device, and seconds that the host needs to launch, of each contender in each round.

    A GPU first sleeps while the host queues a whole round behind it: the device times then hold no gaps in which it
    waits for launches, as they would for short kernels. On the CPU the two are the same. Contenders are warm.
    """
    if trial.device.type != "cuda":
        seconds = interleave(contenders, trial)
        return seconds, seconds
    once = once_each(contenders, trial)
    rounds = rounds_for(2 * sum(once.values()), trial)
    on_device, on_host = ({name: [] for name in once} for _ in range(2))
    queueing = sum(once.values())
    for turn in range(rounds):
        events = {}
        torch.cuda.synchronize(trial.device)
        torch.cuda._sleep(int(min(2 * queueing, LONGEST_SLEEP) * CLOCK_HZ))
        start_of_round = time.perf_counter()
        for name in _order(contenders, trial, turn):
            with trial.guard(name):
                events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                start = time.perf_counter()
                events[name][0].record()
                contenders[name]()
                events[name][1].record()
                on_host[name].append(time.perf_counter() - start)
        queueing = time.perf_counter() - start_of_round
        torch.cuda.synchronize(trial.device)
        for name, (begin, end) in events.items():
            if name not in trial.failures:
                on_device[name].append(begin.elapsed_time(end) / 1e3)
    alive = [name for name in once if name not in trial.failures]
    return {name: on_device[name] for name in alive}, {name: on_host[name] for name in alive}


def peak_memory(run: Callable, device: torch.device) -> float:
    """Largest MiB of tensors that `run` holds at once beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of inputs to rotate through, so that together they are several times the cache."""
    cache = CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-CACHES * cache // bytes_per_set))


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile of at least two values."""
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]


def summarize(seconds: list[float], reference: list[float] | None, images: int) -> dict:
    """Median and quartiles of the rate, and of the ratio to the reference within a round.

    Args:
        seconds: Of one contender, by round.
        reference: Of the reference, by round; None where it failed, which leaves the ratios out.
        images: Images in one call.
    """
    rates = [images / s for s in seconds]
    summary = dict(
        images_per_second=statistics.median(rates),
        quartiles=quartiles(rates),
        milliseconds=1e3 * statistics.median(seconds),
        milliseconds_quartiles=[1e3 * q for q in quartiles(seconds)],
        rounds=len(seconds),
    )
    if reference is not None:
        ratios = [r / s for r, s in zip(reference, seconds, strict=True)]
        summary.update(ratio=statistics.median(ratios), ratio_quartiles=quartiles(ratios))
    return summary
