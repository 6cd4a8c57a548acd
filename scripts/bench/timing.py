"""Interleaved timing on any device, peak memory, and medians with quartiles."""
import gc
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles

import timm
import torch

# Calls before the first timed one: on a GPU the first few compile, choose algorithms and raise the clocks.
WARMUP_CALLS = {"cuda": 3, "cpu": 1}
# `torch.cuda._sleep` counts cycles of the multiprocessors' clock, which runs at 2 GHz at most.
CLOCK_HZ = 2e9
LONGEST_SLEEP_SECONDS = 0.2
# On a GPU, one sample of a fast call is the mean of as many calls as fill this time.
LEAST_SAMPLE_SECONDS = 0.05
LONGEST_REASON = 160
OUT_OF_MEMORY, NO_TIME = "out of memory", "left out for lack of time"


def machine(device: torch.device) -> dict:
    """What the measurements depend on: device, cores, threads, versions, date."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__,
        timm=timm.__version__, date=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def describe(error: BaseException) -> str:
    """An error as one short line for a table."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def release(device: torch.device):
    """Free the memory of finished contenders. Raises the error of a GPU that no longer works."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@dataclass
class Trial:
    """Where and how long to measure one case, and which of its contenders have failed."""
    device: torch.device
    least_rounds: int
    most_rounds: int
    deadline: float = math.inf  # `time.time()` by which the rounds should be over: their number is chosen to fit
    end: float = math.inf  # `time.time()` when the time for all cases is over: nothing expensive is started
    failures: dict[str, str] = field(default_factory=dict)  # the reason by contender

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """An exception in this block is recorded as the failure of contender `name`; the others are still measured."""
        try:
            yield
        except Exception as error:
            self.failures[name] = describe(error)
        if name in self.failures:
            # Not in the handler: the traceback there still holds the tensors of all its frames.
            release(self.device)

    def turns(self, names: list[str], seconds_per_round: float) -> Iterator[list[str]]:
        """The contenders that still run, once a round, starting with another one each time.

        There are as many rounds as fit before the deadline, within the bounds; after the end, only two.
        """
        affordable = (self.deadline - time.time()) / max(seconds_per_round, 1e-9)
        for turn in range(int(min(max(affordable, self.least_rounds), self.most_rounds))):
            alive = [name for name in names if name not in self.failures]
            if not alive or (turn >= 2 and time.time() > self.end):
                return
            first = turn % len(alive)
            yield alive[first:] + alive[:first]


def timed(run: Callable, device: torch.device, calls: int = 1) -> float:
    """Mean seconds of a call, until the last result is there."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def warm_up(run: Callable, device: torch.device):
    for _ in range(WARMUP_CALLS[device.type]):
        timed(run, device)


def _once_each(contenders: dict[str, Callable], trial: Trial) -> dict[str, float]:
    """Seconds of one call of each contender that has not failed."""
    seconds = {}
    for name, run in contenders.items():
        if name not in trial.failures:
            with trial.guard(name):
                seconds[name] = timed(run, trial.device)
    return seconds


def interleave(contenders: dict[str, Callable], trial: Trial) -> dict[str, list[float]]:
    """Seconds until the results are there, by round, of each contender that does not fail.

    Every round runs each contender once, so that a slow moment of the machine affects all of them. Contenders must be
    warmed up.
    """
    once = _once_each(contenders, trial)
    on_gpu = trial.device.type == "cuda"
    calls = {name: max(1, round(LEAST_SAMPLE_SECONDS / s)) if on_gpu else 1 for name, s in once.items()}
    seconds = {name: [] for name in once}
    for names in trial.turns(list(once), sum(once[name] * calls[name] for name in once)):
        for name in names:
            with trial.guard(name):
                seconds[name].append(timed(contenders[name], trial.device, calls[name]))
    return {name: samples for name, samples in seconds.items() if name not in trial.failures}


def interleave_queued(contenders: dict[str, Callable], trial: Trial) -> tuple[dict[str, list], dict[str, list]]:
    """Seconds on the device, and seconds that the host takes to launch, by round, of each contender that does not fail.

    A GPU first sleeps while the host queues a whole round behind it, so that the device times of short kernels hold no
    gaps in which the GPU waits for launches. On the CPU both are the seconds of `interleave`.
    """
    if trial.device.type != "cuda":
        seconds = interleave(contenders, trial)
        return seconds, seconds
    once = _once_each(contenders, trial)
    on_device, on_host = ({name: [] for name in once} for _ in range(2))
    queueing = sum(once.values())
    for names in trial.turns(list(once), 2 * sum(once.values())):
        events = {}
        torch.cuda.synchronize(trial.device)
        torch.cuda._sleep(int(min(2 * queueing, LONGEST_SLEEP_SECONDS) * CLOCK_HZ))
        start_of_round = time.perf_counter()
        for name in names:
            with trial.guard(name):
                events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                start = time.perf_counter()
                events[name][0].record()
                contenders[name]()
                events[name][1].record()
                on_host[name].append(time.perf_counter() - start)
        queueing = time.perf_counter() - start_of_round
        torch.cuda.synchronize(trial.device)
        for name in events.keys() - trial.failures.keys():
            begin, end = events[name]
            on_device[name].append(begin.elapsed_time(end) / 1e3)
    alive = [name for name in once if name not in trial.failures]
    return {name: on_device[name] for name in alive}, {name: on_host[name] for name in alive}


def peak_memory(run: Callable, device: torch.device) -> float:
    """MiB of the tensors that `run` holds at once, at most, beyond those that exist before."""
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


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile of at least two values."""
    low, _, high = quantiles(values, n=4)
    return [low, high]


def summarize(seconds: list[float], reference: list[float] | None, images: int) -> dict:
    """Medians and quartiles, over the rounds, of the rate and the time of a call on `images` images.

    Where there are seconds of the reference too, also of the ratio to it within a round: above 1 is faster.
    """
    rates = [images / s for s in seconds]
    summary = dict(
        images_per_second=median(rates), quartiles=quartiles(rates), milliseconds=1e3 * median(seconds),
        milliseconds_quartiles=[1e3 * q for q in quartiles(seconds)], rounds=len(seconds),
    )
    if reference is not None:
        ratios = [r / s for r, s in zip(reference, seconds, strict=True)]
        summary.update(ratio=median(ratios), ratio_quartiles=quartiles(ratios))
    return summary


def compare(rows: dict[str, dict], builders: dict[str, Callable], reference: str, images: int, trial: Trial,
            queued: bool = False) -> list[dict]:
    """Prepare contenders and measure them side by side; returns their rows with times and memory, or why they failed.

    Args:
        rows: What is known of each contender before.
        builders: By contender, a function that returns the one to be timed.
        reference: The contender that ratios are to.
        images: Images in one call.
        trial: What would not be prepared before `trial.end`, going by the slowest so far, is left out.
        queued: Time on the device, by `interleave_queued`, and add the host's time to the rows.
    """
    runs, slowest = {}, 0.0
    for name in [name for name in builders if name not in trial.failures]:
        start = time.time()
        if start + slowest > trial.end:
            trial.failures[name] = NO_TIME
            continue
        with trial.guard(name):
            run = builders[name]()
            warm_up(run, trial.device)
            seconds = time.time() - start
            rows[name].update(preparation_seconds=seconds, peak_memory_mb=peak_memory(run, trial.device))
            runs[name] = run
        slowest = max(slowest, time.time() - start)
    seconds, on_host = interleave_queued(runs, trial) if queued else (interleave(runs, trial), {})
    for name, row in rows.items():
        if name in trial.failures:
            row.update(failed=trial.failures[name])
            continue
        row.update(summarize(seconds[name], seconds.get(reference), images))
        if name in on_host:
            row.update(host_milliseconds=1e3 * median(on_host[name]),
                       host_quartiles=[1e3 * q for q in quartiles(on_host[name])])
    return list(rows.values())
