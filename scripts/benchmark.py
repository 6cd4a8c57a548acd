"""Measure models or the attention op side by side: interleaved, in one process, medians with their spread.

    python scripts/benchmark.py models biformer_tiny swin_tiny_patch4_window7_224 --batch_size 8
    python scripts/benchmark.py models biformer_tiny biformer_tiny:attn_impl=gather --modes infer
    python scripts/benchmark.py op --batch_size 8
    python scripts/benchmark.py data --data_path FOLDER     # what a core decodes and augments; cores for one GPU
    python scripts/benchmark.py broad                       # BViT's broad attention beside its network
    python scripts/benchmark.py all                         # everything there is to say about a machine, in minutes
    python scripts/benchmark.py plot benchmarks/RECORD.json # draw what `all` found once more

Every round runs each contender once, so that a slow moment of the machine hits all alike; ratios are taken within a
round. Results go to a JSON file in `benchmarks/`, and to the terminal as Markdown tables. A contender that fails is
reported with the reason, and the others go on.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ops import IMPLS  # noqa: E402
from scripts.bench import attention, broad, goals, loader, networks, plot, session, suite, tables  # noqa: E402
from scripts.bench.ceilings import floor_milliseconds  # noqa: E402
from scripts.bench.timing import machine  # noqa: E402
from scripts.bench.trial import Trial  # noqa: E402
from utils import UserError  # noqa: E402

DEFAULT_MODELS = ["biformer_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "biformer_stl"]


def slug(*words: str) -> str:
    """Words as the name of a file."""
    return "".join(c if c.isalnum() else "-" for c in "-".join(words).lower())


def trial_of(args: argparse.Namespace) -> Trial:
    return Trial(torch.device(args.device), least_rounds=args.rounds, most_rounds=args.rounds)


def contender(text: str) -> networks.Contender:
    """`NAME`, or `NAME:KEYWORD=VALUE` with words for values, as one to be measured."""
    name, _, keywords = text.partition(":")
    kwargs = tuple(tuple(keyword.split("=", 1)) for keyword in keywords.split(",") if keyword)
    return networks.Contender(name, kwargs, text)


def benchmark_models(args: argparse.Namespace) -> list[dict]:
    """Rows of networks.measure, for each mode."""
    results = []
    contenders = tuple(contender(text) for text in args.models)
    for mode in args.modes:
        setting = networks.Setting(mode, args.batch_size, args.input_size, args.amp, args.channels_last, args.compile)
        results += networks.measure(networks.Group(contenders, args.reference, setting), trial_of(args))
    return results


def benchmark_op(args: argparse.Namespace) -> list[dict]:
    """Rows of attention.measure, for each scale, stage and mode."""
    results = []
    for scale in args.scales:
        for i, (side, heads, topk) in enumerate(suite.STAGES_AT_224):
            side = round(side * scale)
            for mode in args.modes:
                mode = attention.BACKWARD if mode == networks.TRAIN else attention.FORWARD
                case = attention.AttentionCase(
                    f"{round(224 * scale)}, stage {i + 1}", args.batch_size, side, side, heads, 7, topk, mode,
                    tuple(args.contenders), dtype=suite.DTYPES[args.amp],
                )
                results += attention.measure(case, trial_of(args))
    return results


def benchmark_broad(args: argparse.Namespace) -> list[dict]:
    """Rows of broad.measure, for each model."""
    return [row for name in args.models for row in broad.measure(name, args.batch_size, trial_of(args))]


def named_rate(text: str) -> tuple[str, float]:
    """`NAME=RATE`, or `RATE` alone."""
    name, _, rate = text.rpartition("=")
    if not 0 < float(rate) < float("inf"):
        raise ValueError
    return name or f"at {rate}", float(rate)


def benchmark_data(args: argparse.Namespace):
    """Decoders, transforms and the loader on one core, and the cores that one GPU needs of them."""
    torch.set_num_threads(1)
    if args.data_path is None:
        photos = loader.prepare(loader.synthetic(args.images), "synthetic: random clouds, from a seed")
    else:
        photos = loader.prepare(loader.photographs(args.data_path, args.images), "photographs")
    rows = loader.measure(photos, Trial(torch.device("cpu"), least_rounds=args.rounds, most_rounds=args.rounds))
    rates = dict(args.rate) or loader.recorded_rates(args.output) or loader.EXAMPLE_RATES
    needed = loader.cores(rates, rows)
    settings = dict(images=args.images, rounds=args.rounds)
    write_record(args, torch.device("cpu"), settings, dict(photos=photos.about, results=rows, cores=needed))
    print("\n\n".join([loader.describe(photos), tables.decoders_table(rows), tables.pipeline_table(rows),
                       tables.cores_table(needed)]))


def write_record(args: argparse.Namespace, device: torch.device, settings: dict, found: dict):
    """Into `--output`, under the names of the device, the command and the date."""
    about = machine(device)
    path = args.output / (slug(about["device"], str(about["cores"]), "cores", args.command, about["date"]) + ".json")
    session.write_json(path, dict(machine=about, benchmark=args.command, settings=settings, **found))
    print(f"{path}\n")


def judge(record: dict):
    """Add to a record what follows from it: the ceilings apart, floors, and goals."""
    rows = {name: found["rows"] for name, found in record["sections"].items()}
    if rows.get("ceilings"):
        record["ceilings"] = rows["ceilings"][0]
        for row in rows.get("attention", []):
            if "failed" not in row:
                row["floor_milliseconds"] = floor_milliseconds(row, record["ceilings"])
                row["times_floor"] = row["milliseconds"] / row["floor_milliseconds"]
    record["goals"] = goals.attention_goals(rows.get("attention", []))
    record["goals"] += goals.model_goals(rows.get("models", []) + rows.get("compiled", []))


def draw(record: dict, path: Path):
    """Draw what can be drawn; say why if nothing can."""
    try:
        plot.growth_figure(record).savefig(path)
        print(path)
    except (ImportError, ValueError) as error:
        print(f"no plot: {error}" + (" (requirements-dev.txt has it)" if isinstance(error, ImportError) else ""))


def benchmark_all(args: argparse.Namespace):
    """Everything in suite.py, into <device>.json, .md and .png; what is done is on the disk at any moment."""
    start = time.time()
    device = torch.device(args.device)
    about = machine(device)
    words = [about["device"]] if device.type == "cuda" else [about["device"], str(about["cores"]), "cores"]
    path = args.output / (slug(*words) + ".json")
    settings = dict(device=args.device, budget=args.budget, threads=args.threads)
    record = dict(machine=about, benchmark="all", settings=settings, sections={})

    def save(record: dict):
        judge(record)
        session.write_json(path, record)

    scale = suite.SCALES[device.type]
    worker = session.Worker(device, args.threads, scale.least_rounds)
    try:
        session.run(suite.sections(scale), worker, start, args.budget, record, save)
    finally:
        worker.stop()
    record["seconds"] = time.time() - start
    save(record)
    text = tables.document(record)
    path.with_suffix(".md").write_text(text)
    print(text)
    draw(record, path.with_suffix(".png"))
    print(f"{path}\n{time.time() - start:.0f} s")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_models = commands.add_parser("models", help="images per second and memory of timm models")
    of_models.add_argument("models", nargs="*", default=DEFAULT_MODELS, help="NAME or NAME:KEYWORD=VALUE")
    of_models.add_argument("--reference", default="swin_tiny_patch4_window7_224", help="what ratios are to")
    of_models.add_argument("--input_size", type=int, default=224)
    of_models.add_argument("--channels_last", action="store_true", help="hold images and weights channels last")
    of_models.add_argument("--compile", action="store_true", help="torch.compile each model")
    of_op = commands.add_parser("op", help="the implementations of routed attention at BiFormer's stages")
    of_op.add_argument("--scales", type=float, nargs="+", default=[1.0], help="image sides in multiples of 224")
    of_op.add_argument("--contenders", nargs="+", default=list(IMPLS),
                       choices=[*IMPLS, attention.DENSE, attention.FLEX])
    of_broad = commands.add_parser("broad", help="what BViT's broad attention costs beside its network")
    of_broad.add_argument("models", nargs="*", default=["bvit_5m", "bvit_22m"], help="of BViT's family")
    of_all = commands.add_parser("all", help="op, models, growing images and a profile, within a budget of seconds")
    of_all.add_argument("--budget", type=float, default=480, help="seconds; what does not fit is left out")
    of_plot = commands.add_parser("plot", help="draw a record of `all` once more, beside it")
    of_plot.add_argument("record", type=Path)
    of_data = commands.add_parser("data", help="what a core decodes and augments, and how many cores one GPU needs")
    of_data.add_argument("--data_path", type=Path, help="train/CLASS/IMAGE; without it, synthetic JPEG images")
    of_data.add_argument("--images", type=int, default=100, help="how many of them, spread evenly over the folder")
    of_data.add_argument("--rate", type=named_rate, action="append", default=[], metavar="[NAME=]RATE",
                         help="images/s that a GPU trains on (default: the newest record of a GPU in --output)")
    for command in (of_models, of_op):
        command.add_argument("--modes", nargs="+", choices=["infer", "train"], default=["infer", "train"])
        command.add_argument("--amp", choices=list(suite.DTYPES), default="off")
    for command in (of_models, of_op, of_broad):
        command.add_argument("--batch_size", type=int, default=8)
    for command in (of_models, of_op, of_broad, of_data):
        command.add_argument("--rounds", type=int, default=15)
    for command in (of_models, of_op, of_broad, of_data, of_all):
        command.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    for command in (of_models, of_op, of_broad, of_all):
        command.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace):
    if getattr(args, "rounds", 2) < 2:
        parser.error("--rounds must be at least 2, for there to be a spread")
    kind = getattr(args, "device", "cpu").partition(":")[0]
    if kind not in suite.SCALES:
        parser.error(f"--device must be one of {', '.join(suite.SCALES)}, got {args.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch sees no CUDA GPU here")
    if args.command == "data" and args.images < 1:
        parser.error("--images must be at least 1")
    if args.command == "all" and args.budget <= 0:
        parser.error("--budget must be positive")
    if args.command == "plot" and not args.record.is_file():
        parser.error(f"no record at {args.record}")
    if args.command == "broad" and not set(args.models) <= set(timm.list_models(module="bvit")):
        parser.error(f"broad attention is BViT's: {', '.join(timm.list_models(module='bvit'))}")
    if args.command == "models":
        names = [text.partition(":")[0] for text in [*args.models, args.reference]]
        unknown = [name for name in names if not timm.is_model(name)]
        if unknown:
            parser.error(f"unknown model {', '.join(unknown)}")
        if args.reference not in args.models:
            args.models = [*args.models, args.reference]


def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.command == "all":
        return benchmark_all(args)
    if args.command == "data":
        try:
            return benchmark_data(args)
        except UserError as error:
            sys.exit(str(error))
    if args.command == "plot":
        return draw(json.loads(args.record.read_text()), args.record.with_suffix(".png"))
    if args.threads:
        torch.set_num_threads(args.threads)
    measure, table = {
        "models": (benchmark_models, tables.models_table),
        "op": (benchmark_op, tables.attention_table),
        "broad": (benchmark_broad, tables.broad_table),
    }[args.command]
    results = measure(args)
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "models", "output")}
    write_record(args, torch.device(args.device), settings, dict(results=results))
    print(table(results))


if __name__ == "__main__":
    main()
