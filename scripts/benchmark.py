"""Measure models or the attention op side by side: interleaved, in one process, medians with their spread.

    python scripts/benchmark.py models biformer_tiny swin_tiny_patch4_window7_224 --batch_size 8
    python scripts/benchmark.py op --batch_size 8

Every round runs each contender once, so that a slow moment of the machine hits all alike; ratios are taken within a
round. Results go to a JSON file in `benchmarks/`, and to the terminal as a Markdown table.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402, F401, registers our models with timm
from ops import IMPLS, RegionGrid, choose_impl, route_regions, routed_attention  # noqa: E402

DEFAULT_MODELS = ["biformer_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "biformer_stl"]
# (side of the map, heads, head_dim, top-k) of the routed stages of BiFormer-T and S for a 224 image
STAGES_AT_224 = [(56, 2, 32, 1), (28, 4, 32, 4), (14, 8, 32, 16)]


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


def interleave(contenders: dict[str, Callable], device: torch.device, rounds: int, warmup: int) -> dict[str, list]:
    """Seconds of each contender in each round."""
    seconds = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, run in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(run: Callable, device: torch.device) -> float:
    """Largest MiB of tensors that `run` holds at once beyond what was there before."""
    if device.type == "cuda":
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


def summarize(seconds: list[float], reference: list[float], images: int) -> dict:
    """Median and quartiles of the rate, and of the ratio to the reference within a round."""
    rates = [images / s for s in seconds]
    ratios = [r / s for r, s in zip(reference, seconds, strict=True)]
    low, _, high = statistics.quantiles(rates, n=4)
    ratio_low, _, ratio_high = statistics.quantiles(ratios, n=4)
    return dict(
        images_per_second=statistics.median(rates),
        quartiles=[low, high],
        ratio=statistics.median(ratios),
        ratio_quartiles=[ratio_low, ratio_high],
        milliseconds=1e3 * statistics.median(seconds),
    )


# --- models ---------------------------------------------------------------------------------------------------------


def model_run(name: str, mode: str, args: argparse.Namespace) -> tuple[Callable, torch.nn.Module]:
    """One inference batch or one training step of a model, to be called again and again."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    size = args.input_size
    fixed = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    model = timm.create_model(name, **(dict(img_size=size) if fixed else {}))
    for module in model.modules():
        # Some factories turn it on and some do not; here all train without.
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    model = model.to(device, memory_format=memory_format).train(mode == "train")
    images = torch.randn(args.batch_size, 3, size, size, device=device).to(memory_format=memory_format)
    targets = torch.randint(1000, (args.batch_size,), device=device)
    network = torch.compile(model) if args.compile else model
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4) if mode == "train" else None

    def infer():
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            network(images)

    def train():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return (train if mode == "train" else infer), model


def benchmark_models(args: argparse.Namespace) -> list[dict]:
    device = torch.device(args.device)
    results = []
    for mode in args.modes:
        runs = {name: model_run(name, mode, args) for name in args.models}
        seconds = interleave({name: run for name, (run, _) in runs.items()}, device, args.rounds, args.warmup)
        reference = seconds[args.reference]
        for name, (run, model) in runs.items():
            results.append(
                dict(
                    model=name,
                    mode=mode,
                    parameters=sum(p.numel() for p in model.parameters()),
                    peak_memory_mb=peak_memory(run, device),
                    **summarize(seconds[name], reference, args.batch_size),
                )
            )
    return results


# --- the op ---------------------------------------------------------------------------------------------------------


def op_run(impl: str, side: int, heads: int, head_dim: int, topk: int, mode: str, args) -> tuple[Callable, str]:
    """One call of routed attention at a stage's shape, with its backward in "train"."""
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(0)
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    qkv = torch.randn(args.batch_size, side, side, 3, heads, head_dim, generator=generator, device=device).to(dtype)
    qkv.requires_grad_(mode == "train")
    grid = RegionGrid.fit(side, side)
    with torch.no_grad():
        query, key, _ = qkv.unbind(3)
        routes = route_regions(query, key, grid, grid, topk)
    upstream = torch.randn_like(query)

    def infer():
        with torch.inference_mode():
            routed_attention(*qkv.unbind(3), routes, grid, grid, impl=impl)

    def train():
        torch.autograd.grad(routed_attention(*qkv.unbind(3), routes, grid, grid, impl=impl), qkv, upstream)

    return (train if mode == "train" else infer), choose_impl(routes, grid, grid)


def benchmark_op(args: argparse.Namespace) -> list[dict]:
    device = torch.device(args.device)
    results = []
    for scale in args.scales:
        for side, heads, head_dim, topk in STAGES_AT_224:
            side = round(side * scale)
            for mode in args.modes:
                runs = {impl: op_run(impl, side, heads, head_dim, topk, mode, args) for impl in IMPLS}
                seconds = interleave({impl: run for impl, (run, _) in runs.items()}, device, args.rounds, args.warmup)
                for impl, (run, chosen) in runs.items():
                    results.append(
                        dict(
                            map=f"{side} x {side}, {heads} heads, top-{topk}",
                            impl=impl,
                            mode=mode,
                            auto=impl == chosen,
                            peak_memory_mb=peak_memory(run, device),
                            **summarize(seconds[impl], seconds["gather"], args.batch_size),
                        )
                    )
    return results


# --- results --------------------------------------------------------------------------------------------------------


def markdown(results: list[dict], reference: str) -> str:
    """Results as a Markdown table."""
    what = "model" if "model" in results[0] else "impl"
    lines = [
        f"| {what} | mode | images/s (quartiles) | x {reference} (quartiles) | ms | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        name = r[what] if what == "model" else f"{r['map']}: {r['impl']}{' (auto)' if r['auto'] else ''}"
        lines.append(
            f"| {name} | {r['mode']} | {r['images_per_second']:.1f} ({r['quartiles'][0]:.1f} to "
            f"{r['quartiles'][1]:.1f}) | {r['ratio']:.2f} ({r['ratio_quartiles'][0]:.2f} to "
            f"{r['ratio_quartiles'][1]:.2f}) | {r['milliseconds']:.1f} | {r['peak_memory_mb']:.0f} |"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_models = commands.add_parser("models", help="images per second and memory of timm models")
    of_models.add_argument("models", nargs="*", default=DEFAULT_MODELS, help=" ".join(DEFAULT_MODELS))
    of_models.add_argument("--reference", default="swin_tiny_patch4_window7_224", help="what ratios are to")
    of_models.add_argument("--input_size", type=int, default=224)
    of_models.add_argument("--channels_last", action="store_true", help="hold images and weights channels last")
    of_models.add_argument("--compile", action="store_true", help="torch.compile each model")
    of_op = commands.add_parser("op", help="the implementations of routed attention at BiFormer's stages")
    of_op.add_argument("--scales", type=float, nargs="+", default=[1.0], help="image sides in multiples of 224")
    for command in (of_models, of_op):
        command.add_argument("--modes", nargs="+", choices=["infer", "train"], default=["infer", "train"])
        command.add_argument("--batch_size", type=int, default=8)
        command.add_argument("--rounds", type=int, default=15)
        command.add_argument("--warmup", type=int, default=3)
        command.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off")
        command.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the JSON file")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2, for there to be a spread")
    if args.command == "models":
        unknown = [name for name in [*args.models, args.reference] if not timm.is_model(name)]
        if unknown:
            parser.error(f"unknown model {', '.join(unknown)}")
        if args.reference not in args.models:
            args.models = [*args.models, args.reference]
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = benchmark_models(args) if args.command == "models" else benchmark_op(args)
    about = machine(torch.device(args.device))
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "models", "output")}
    name = "-".join([about["device"], str(about["cores"]), "cores", args.command, about["date"]])
    path = args.output / ("".join(c if c.isalnum() else "-" for c in name.lower()) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = dict(machine=about, benchmark=args.command, settings=settings, results=results)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(results, args.reference if args.command == "models" else "gather"))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
