"""Measure models or the attention op side by side: interleaved, in one process, medians with quartiles.

    python scripts/benchmark.py models biformer_tiny swin_tiny_patch4_window7_224 --batch_size 8
    python scripts/benchmark.py models biformer_tiny biformer_tiny:attn_impl=gather --modes infer
    python scripts/benchmark.py models upernet/biformer_tiny --reference upernet/convnext_tiny --input_size 512x2048
    python scripts/benchmark.py op --batch_size 8
    python scripts/benchmark.py choice --budget 600         # what `auto` chooses, on shapes drawn from a grid
    python scripts/benchmark.py data --data_path FOLDER     # images/s of a core, and cores for one GPU
    python scripts/benchmark.py broad                       # BViT's broad attention beside its network
    python scripts/benchmark.py runtimes biformer_tiny      # PyTorch, compiled, ONNX Runtime, OpenVINO on the CPU
    python scripts/benchmark.py int8 --data_path FOLDER     # accuracy and routes in 8-bit integers, by quantizer
    python scripts/benchmark.py all                         # op, models and profile, within a budget of seconds
    python scripts/benchmark.py plot benchmarks/RECORD.json # draw a record of `all` again

Every round runs each contender once, so that a slow moment of the machine affects all of them; ratios are taken within
a round. A contender that fails is reported with the reason, and the others are still measured. After each case the
results so far are written to a JSON record in `--output` (by `all` as Markdown tables too) and printed at the end.
"""
import argparse
import json
import math
import sys
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import training.startup  # before torch, as main.py does  # noqa: E402, F401  # isort: skip
import timm  # noqa: E402
import torch  # noqa: E402
from timm.layers import to_2tuple  # noqa: E402

from ops import IMPLS  # noqa: E402
from scripts.bench import attention, choice, int8, loader, models, runtimes, suite, tables  # noqa: E402
from scripts.bench.suite import Case  # noqa: E402
from scripts.bench.timing import machine  # noqa: E402
from scripts.exporting.int8 import CALIBRATION_IMAGES, spread  # noqa: E402
from scripts.exporting.source import Source  # noqa: E402
from scripts.prediction.classifier import add_network_flags, load_network  # noqa: E402
from scripts.prediction.images import find_images  # noqa: E402
from scripts.prediction.published import DEFAULT_MODEL  # noqa: E402
from tasks.options import image_size  # noqa: E402
from utils import UserError, replace_file, user_path  # noqa: E402

DEFAULT_MODELS = ("biformer_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "biformer_stl")
NOT_SETTINGS = ("command", "models", "output", "data_path", "checkpoint", "rate")


def all_cases(args: argparse.Namespace) -> list[Case]:
    cases = suite.cases(suite.SCALES[args.device.partition(":")[0]])
    return [case for case in cases if case.section in ("ceilings", *args.sections)]


def models_cases(args: argparse.Namespace) -> list[Case]:
    cases = []
    size = to_2tuple(args.input_size)
    for mode in args.modes:
        setting = models.Setting(
            mode, args.batch_size, size, args.amp, args.channels_last, args.compile, args.cuda_graph
        )
        cases.append(Case("models", mode, partial(models.measure, args.models, args.reference, setting)))
    return cases


def op_cases(args: argparse.Namespace) -> list[Case]:
    cases = []
    for scale, i, mode in product(args.scales, range(len(suite.STRIDES)), args.modes):
        side = round(scale * 224 / suite.STRIDES[i])
        shape = attention.AttentionCase(
            f"{round(224 * scale)}, stage {i + 1}", args.batch_size, side, side, suite.HEADS[i], suite.REGIONS,
            suite.TOPK[i], attention.BACKWARD if mode == models.TRAIN else attention.FORWARD, tuple(args.contenders),
            dtype=suite.DTYPES[args.amp],
        )
        cases.append(Case("op", f"{shape.stage}, {mode}", partial(attention.measure, shape)))
    return cases


def broad_cases(args: argparse.Namespace) -> list[Case]:
    return [Case("broad", name, partial(models.measure_broad, name, args.batch_size)) for name in args.models]


def choice_cases(args: argparse.Namespace) -> list[Case]:
    return [Case("choice", name, measure) for name, measure in choice.cases()]


def runtimes_cases(args: argparse.Namespace) -> list[Case]:
    size = to_2tuple(args.input_size)
    return [
        Case("runtimes", name, partial(runtimes.measure, name, size, args.thread_counts, args.batch_sizes))
        for name in args.models
    ]


def int8_cases(args: argparse.Namespace) -> list[Case]:
    source = Source.of(*load_network(args))
    calibration, photos = (
        spread(find_images([args.data_path / split]), most)
        for split, most in (("train", CALIBRATION_IMAGES), ("val", args.images))
    )
    return [Case("int8", source.metadata.model, partial(int8.measure, source, calibration, photos))]


CASES = {
    "all": all_cases, "models": models_cases, "op": op_cases, "broad": broad_cases, "choice": choice_cases,
    "runtimes": runtimes_cases, "int8": int8_cases,
}


def record_path(args: argparse.Namespace, about: dict) -> Path:
    """Named after the device, and but for `all` after the command and the date."""
    words = [about["device"]]
    if args.command != "all" or args.device == "cpu":
        words += [f"{about['cores']} cores"]
    if args.command != "all":
        words += [args.command, about["date"]]
    return args.output / ("".join(c if c.isalnum() else "-" for c in "-".join(words).lower()) + ".json")


def collect(record: dict, sections: dict[str, dict], args: argparse.Namespace):
    """Put what was found so far into the record, with what follows from it."""
    if args.command != "all":
        found = sections[args.command]
        record.update(results=found["rows"], failed=found["failed"])
        if args.command == "choice":
            record.update(results=choice.summary(found["rows"]), shapes=found["rows"])
        if args.command == "data":
            record["cores"] = loader.cores(dict(args.rate) or loader.EXAMPLE_RATES, found["rows"])
        return
    record.update(sections=sections, seconds=sum(found["seconds"] for found in sections.values()))
    if sections["ceilings"]["rows"]:
        record["ceilings"] = sections["ceilings"]["rows"][0]
        attention.add_floors(sections.get("attention", {}).get("rows", []), record["ceilings"])


def measure(args: argparse.Namespace):
    """Measure the cases of a command, writing the record after each, and print the tables."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    record = dict(machine=machine(device), benchmark=args.command, settings=settings)
    path = record_path(args, record["machine"])
    if args.command == "data":
        files, record["photos"] = loader.read_files(args.data_path, args.images)
        cases = [Case("data", "decoding, transforms, loader", partial(loader.measure, files))]
    else:
        cases = CASES[args.command](args)
    bounds = suite.SCALES[device.type].least_rounds, suite.MOST_ROUNDS
    rounds = (args.rounds, args.rounds) if "rounds" in args else bounds
    for sections in suite.run(cases, device, rounds, getattr(args, "budget", math.inf)):
        collect(record, sections, args)
        text = json.dumps(record, indent=1) + "\n"
        replace_file(path, lambda file, text=text: file.write(text.encode()))
        if args.command == "all":
            path.with_suffix(".md").write_text(tables.document(record))
    print(f"\n{tables.document(record)}\n{path}")
    if args.command == "all":
        draw(record, path.with_suffix(".png"))


def draw(record: dict, path: Path):
    """Plot how the cost of an image grows, or say why there is no plot."""
    try:
        tables.growth_figure(record).savefig(path)
        print(path)
    except (ImportError, ValueError) as error:
        print(f"no plot: {error}" + (" (requirements-dev.txt has it)" if isinstance(error, ImportError) else ""))


def named_rate(text: str) -> tuple[str, float]:
    """`NAME=RATE`, or `RATE` alone."""
    name, _, rate = text.rpartition("=")
    if not 0 < float(rate) < math.inf:
        raise ValueError
    return name or f"at {rate}", float(rate)


def contender(text: str) -> models.Contender:
    """A type of arguments: `NAME` or `NAME:KEYWORD=VALUE,...` of a model that timm knows, or `HEAD/NAME` and so on."""
    parsed = models.Contender.parse(text)
    try:
        parsed.check()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return parsed


def add_exported(commands: argparse._SubParsersAction) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The commands that measure what scripts/export.py writes."""
    of_runtimes = commands.add_parser("runtimes", help="a classifier on the CPU by PyTorch, ONNX Runtime and OpenVINO")
    of_runtimes.add_argument("models", nargs="+", choices=timm.list_models(), metavar="MODEL")
    of_runtimes.add_argument("--input_size", type=image_size, default=224, help="side, or HEIGHTxWIDTH")
    of_runtimes.add_argument("--thread_counts", type=int, nargs="+", default=[1, 2])
    of_runtimes.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    of_int8 = commands.add_parser("int8", help="accuracy and routes in 8-bit integers, by several quantizers")
    add_network_flags(of_int8)
    of_int8.add_argument("--data_path", type=user_path, required=True, help="train/ to calibrate on, val/CLASS/IMAGE")
    of_int8.add_argument("--images", type=int, default=1000, help="how many of val/, spread evenly (default: 1000)")
    for command in (of_runtimes, of_int8):
        command.set_defaults(device="cpu", threads=None)
    return of_runtimes, of_int8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_models = commands.add_parser("models", help="images per second and memory of timm models")
    defaults = [contender(name) for name in DEFAULT_MODELS]
    of_models.add_argument("models", nargs="*", type=contender, default=defaults,
                           help="NAME or NAME:KEYWORD=VALUE; HEAD/NAME for a segmenter, DETECTOR/NAME")
    of_models.add_argument(
        "--reference", type=contender, default="swin_tiny_patch4_window7_224", help="the model that ratios are to"
    )
    of_models.add_argument("--input_size", type=image_size, default=224, help="side, or HEIGHTxWIDTH")
    of_models.add_argument("--channels_last", action="store_true", help="images and weights in channels-last layout")
    of_models.add_argument("--compile", action="store_true", help="torch.compile each model")
    of_models.add_argument("--cuda_graph", action="store_true", help="replay each model from CUDA graphs")
    of_op = commands.add_parser("op", help="the implementations of routed attention at BiFormer's stages")
    of_op.add_argument("--scales", type=float, nargs="+", default=[1.0], help="image sides in multiples of 224")
    of_op.add_argument("--contenders", nargs="+", default=list(IMPLS),
                       choices=[*IMPLS, attention.DENSE, attention.FLEX])
    of_broad = commands.add_parser("broad", help="what BViT's broad attention costs beside its network")
    of_broad.add_argument("models", nargs="*", default=["bvit_5m", "bvit_22m"], help="models of BViT's family")
    of_data = commands.add_parser("data", help="what a core decodes and augments, and how many cores one GPU needs")
    of_data.add_argument("--data_path", type=user_path, help="train/CLASS/IMAGE; without it, synthetic JPEG images")
    of_data.add_argument("--images", type=int, default=100, help="how many of them, spread evenly over the folder")
    of_data.add_argument("--rate", type=named_rate, action="append", default=[], metavar="[NAME=]RATE",
                         help="images/s that a GPU trains on")
    of_data.set_defaults(device="cpu", threads=1)
    of_choice = commands.add_parser("choice", help="what `auto` chooses on the CPU, beside all that it could choose")
    of_choice.set_defaults(device="cpu", threads=None)
    of_runtimes, of_int8 = add_exported(commands)
    of_all = commands.add_parser("all", help="op, models, growing images and a profile, within a budget of seconds")
    for command in (of_choice, of_all):
        command.add_argument("--budget", type=float, default=480, help="seconds; what does not fit is left out")
    of_all.add_argument("--sections", nargs="+", choices=suite.SECTIONS, default=list(suite.SECTIONS))
    of_plot = commands.add_parser("plot", help="draw a record of `all` again, beside it")
    of_plot.add_argument("record", type=user_path)
    for command in (of_models, of_op):
        command.add_argument("--modes", nargs="+", choices=["infer", "train"], default=["infer", "train"])
        command.add_argument("--amp", choices=list(suite.DTYPES), default="off")
    for command in (of_models, of_op, of_broad):
        command.add_argument("--batch_size", type=int, default=8)
    for command in (of_models, of_op, of_broad, of_data, of_runtimes):
        command.add_argument("--rounds", type=int, default=15)
    for command in (of_models, of_op, of_broad, of_data, of_choice, of_runtimes, of_int8, of_all):
        command.add_argument("--output", type=user_path, default=ROOT / "benchmarks", help="folder of the results")
    for command in (of_models, of_op, of_broad, of_all):
        command.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if getattr(args, "rounds", 2) < 2:
        parser.error("--rounds must be at least 2, for there to be a spread")
    kind = getattr(args, "device", "cpu").partition(":")[0]
    if kind not in suite.SCALES:
        parser.error(f"--device must be one of {', '.join(suite.SCALES)}, got {args.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch sees no CUDA GPU here")
    if args.command in ("data", "int8") and args.images < 1:
        parser.error("--images must be at least 1")
    if getattr(args, "budget", 1) <= 0:
        parser.error("--budget must be positive")
    if args.command == "plot" and not args.record.is_file():
        parser.error(f"no record at {args.record}")
    if args.command == "broad" and not set(args.models) <= set(timm.list_models(module="bvit")):
        parser.error(f"broad attention is BViT's: {', '.join(timm.list_models(module='bvit'))}")
    if args.command == "runtimes" and min(*args.thread_counts, *args.batch_sizes) < 1:
        parser.error("--thread_counts and --batch_sizes must be at least 1")
    if args.command == "int8" and args.model is None and args.checkpoint is None:
        args.model = DEFAULT_MODEL
    if args.command == "models":
        if args.cuda_graph and kind != "cuda":
            parser.error("--cuda_graph needs a GPU")
        if args.reference not in args.models:
            args.models = [*args.models, args.reference]
        args.reference = args.reference.name
    return args


def main(argv: list[str] | None = None):
    args = parse(argv)
    if args.command == "plot":
        return draw(json.loads(args.record.read_text()), args.record.with_suffix(".png"))
    try:
        measure(args)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
