"""scripts/benchmark.py and scripts/bench: what is measured is what it says, and failures stay where they happen."""
import importlib
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.autograd import DeviceType
from torch.nn.attention.flex_attention import flex_attention

from helpers import ROOT
from models import NetworkRecipe
from models.bvit import broad_attention
from ops import RegionGrid, route_regions, routed_attention
from scripts import benchmark
from scripts.bench import attention, breakdown, flex, int8, layers, models, suite, tables, timing
from scripts.bench.attention import BACKWARD, FORWARD, AttentionCase
from scripts.bench.models import Contender, Setting
from scripts.bench.suite import Case
from scripts.bench.timing import Trial
from scripts.exporting.source import Source

CPU = torch.device("cpu")


def trial(rounds=3, **kwargs):
    return Trial(CPU, rounds, rounds, **kwargs)


def run(tmp_path, capsys, *arguments):
    benchmark.main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text()), capsys.readouterr().out


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models(tmp_path, capsys):
    record, out = run(tmp_path, capsys, "models", "biformer_nano", "--reference", "resnet10t", "--input_size", "32",
                      "--batch_size", "2", "--rounds", "3")
    assert record["machine"]["torch"] == torch.__version__ and record["settings"]["batch_size"] == 2
    assert [(r["model"], r["mode"]) for r in record["results"]] == [
        ("biformer_nano", "infer"), ("resnet10t", "infer"), ("biformer_nano", "train"), ("resnet10t", "train")
    ]
    for result in record["results"]:
        assert result["images_per_second"] == pytest.approx(2e3 / result["milliseconds"], rel=1e-6)
        assert result["peak_memory_mb"] > 0
        assert result["model"] != "resnet10t" or result["ratio"] == 1
        assert f"| {result['model']} | {result['mode']} |" in out
    inference, training = (record["results"][i]["peak_memory_mb"] for i in (0, 2))
    assert training > inference


@pytest.mark.slow
def test_op(tmp_path, capsys):
    record, out = run(tmp_path, capsys, "op", "--batch_size", "1", "--scales", "0.25", "--modes", "train",
                      "--contenders", "gather", "masked", "dense", "--rounds", "3")
    assert [r["impl"] for r in record["results"]] == 3 * ["gather", "masked", "dense"]
    assert [r["height"] for r in record["results"][::3]] == [14, 7, 4]
    assert sum(r["auto"] for r in record["results"]) == 3 and out.count("| yes |") >= 3
    for result in record["results"]:
        assert result["output_repeats"] and result.get("error", 0) < 1e-5


def test_broad(tmp_path, capsys):
    record, out = run(tmp_path, capsys, "broad", "bvit_5m", "--batch_size", "1", "--rounds", "3")
    parts = [models.NETWORK, models.CLASS_TOKEN, models.ALL_TOKENS, models.CONCATENATED]
    assert [r["part"] for r in record["results"]] == parts
    assert all(r["milliseconds"] > 0 and f"| {r['part']} |" in out for r in record["results"])
    network, class_token, all_tokens, concatenated = (r["peak_memory_mb"] for r in record["results"])
    assert class_token < all_tokens < concatenated and network > 0


@pytest.mark.slow
def test_all(tmp_path, capsys, monkeypatch):
    """Every kind of case, at a small size; one fails, and one has no time."""
    tiny = suite.Scale("off", 2, (56, 60), 1, ((32, 32),), 2**20, 64, 3, (("tiny", "infer", 1e6),))
    monkeypatch.setitem(suite.SCALES, "cpu", tiny)
    pair = tuple(Contender(model) for model in ("biformer_nano", "resnet10t"))
    setting = Setting("infer", 1, (32, 32))

    def cases(scale):
        assert scale is tiny
        kinds = {case.section: case for case in reversed(every_case(scale))}
        shape = AttentionCase("224, stage 1", 1, 14, 14, 2, 7, 4, BACKWARD, ("gather", "dense"), dtype=torch.float32)
        return [
            kinds["ceilings"],
            Case("attention", "a", lambda trial: attention.measure(shape, trial)),
            Case("models", "m", lambda trial: models.measure(pair, "resnet10t", setting, trial)),
            Case("models", "broken", lambda trial: 1 / 0),
            kinds["compiled"],
            Case("growth", "g", lambda trial: models.measure_growth(setting, trial)),
            Case("breakdown", "b", lambda trial: breakdown.measure(pair[0], Setting("train", 2, (32, 32)), trial)),
        ]

    every_case = suite.cases
    monkeypatch.setattr(suite, "cases", cases)
    monkeypatch.setattr(models, "GROWTH_REFERENCE", "resnet10t")
    monkeypatch.setattr(models, "growing_contenders", lambda size: pair)
    record, out = run(tmp_path, capsys, "all", "--budget", "300")
    sections = record["sections"]
    assert {name: found["failed"] for name, found in sections.items() if found["failed"]} == {
        "models": {"broken": "ZeroDivisionError: division by zero"}
    }
    assert {name: found["left_out"] for name, found in sections.items() if found["left_out"]} == {
        "compiled": ["tiny, infer"]
    }
    assert all(len(found["rows"]) >= 1 for name, found in sections.items() if name != "compiled")
    row = sections["attention"]["rows"][0]
    assert row["times_floor"] == pytest.approx(row["milliseconds"] / row["floor_milliseconds"])
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".md").read_text() in out and path.with_suffix(".png").stat().st_size > 10_000
    for title in ("Attention", "Models", "Growing images", "A training step"):
        assert f"## {title}" in out
    path.with_suffix(".png").unlink()
    benchmark.main(["plot", str(path)])
    assert path.with_suffix(".png").exists()


@pytest.mark.long
@pytest.mark.compile
def test_runtimes(tmp_path, capsys):
    benchmark.main(["runtimes", "resnet10t", "--input_size", "32", "--thread_counts", "1", "--batch_sizes", "2",
                    "--rounds", "3", "--output", str(tmp_path)])
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["results"]
    assert [(row["runtime"], row["precision"]) for row in rows] == [
        *(("PyTorch", precision) for precision in ("float32", "bf16")),
        *(("PyTorch, compiled", precision) for precision in ("float32", "bf16", "int8")),
        *(("ONNX Runtime", precision) for precision in ("float32", "int8")),
        *(("OpenVINO", precision) for precision in ("float32", "bf16", "int8")),
    ]
    assert all(row["images_per_second"] == pytest.approx(2e3 / row["milliseconds"], rel=1e-6) for row in rows)
    assert rows[0]["ratio"] == 1 and "| resnet10t | 1 | 2 | OpenVINO | int8 |" in capsys.readouterr().out


def nano(size=64):
    network = timm.create_model("biformer_nano", pretrained=True)
    return Source.of(network, NetworkRecipe("biformer_nano", input_size=size), {})


@pytest.mark.slow
@pytest.mark.compile
def test_routes_in_other_runtimes(monkeypatch):
    """In float32 they are PyTorch's; three of the five layers take all regions of this size. A quantizer that fails is
    reported, and the others are measured.
    """
    source = nano()
    monkeypatch.setattr(int8, "builders", lambda source, images: {
        "ONNX": lambda: int8.through_onnx(shutil.copy, source), "fails": lambda: 1 / 0,
    })
    church = [ROOT / "docs" / "church.jpg"]
    first, onnx, fails = int8.measure(source, church, church, trial())
    assert first["changed_routes"] == onnx["changed_routes"] == [0.0] * 2
    assert first["alike"] == onnx["alike"] == 1 and 0 < onnx["difference"] < 1e-4
    assert fails["failed"] == "ZeroDivisionError: division by zero"


@pytest.mark.long
@pytest.mark.compile
def test_every_quantizer(tmp_path, capsys):
    for split in ("train", "val"):
        folder = tmp_path / split / "n03028079"
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "docs" / "church.jpg", folder)
    benchmark.main(["int8", "--data_path", str(tmp_path), "--output", str(tmp_path)])
    first, *rows = json.loads(next(tmp_path.glob("*.json")).read_text())["results"]
    assert first["accuracy"] == 1 and first["changed_routes"] == [0.0] * 5
    assert len(rows) == 7 and not any("failed" in row for row in rows)
    assert all(row["difference"] > 0 and len(row["changed_routes"]) == 5 for row in rows)
    assert "| biformer_nano | 1 | torchao, dynamic | 100.00% |" in capsys.readouterr().out


def test_changed_routes_are_counted_whatever_their_order():
    routes = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    found = torch.tensor([[[1, 0], [2, 4], [4, 5]]])
    assert int8.changed_routes([found, routes], [routes, routes]) == [1, 0]


def test_sections_are_chosen():
    for device, scale in suite.SCALES.items():
        missing = set() if scale.graphs else {"graphed"}
        assert {case.section for case in suite.cases(scale)} == {"ceilings", *suite.SECTIONS} - missing
        args = SimpleNamespace(device=device, sections=["growth", "compiled"])
        assert {case.section for case in benchmark.all_cases(args)} == {"ceilings", "growth", "compiled"}
        names = [(case.section, case.name) for case in suite.cases(scale)]
        assert len(set(names)) == len(names)


def test_keywords_of_a_model_are_values():
    contender = models.Contender.parse("biformer_nano:num_regions=4,attn_impl=gather")
    assert contender.kwargs == (("num_regions", 4), ("attn_impl", "gather"))


def test_segmenters_are_measured():
    """Of a size that is no square; both losses are trained."""
    contenders = [models.Contender(name) for name in ("semantic_fpn/biformer_nano", "semantic_fpn/resnet10t")]
    for mode in ("infer", "train"):
        rows = models.measure(contenders, contenders[1].name, Setting(mode, 2, (32, 64)), trial(rounds=2))
        assert [row["model"] for row in rows] == [contender.name for contender in contenders]
        assert all(row["images_per_second"] > 0 and row["size"] == "32 x 64" for row in rows)


def test_detectors_are_measured():
    """On objects that masks fill."""
    names = [f"{name}/biformer_nano" for name in models.DETECTORS]
    kwargs = (("channels", 16),)
    for mode in ("infer", "train"):
        contenders = [models.Contender(name, kwargs) for name in names]
        rows = models.measure(contenders, names[0], Setting(mode, 2, (64, 96)), trial(rounds=2))
        assert [row["model"] for row in rows] == names and all(row["images_per_second"] > 0 for row in rows), rows
    objects = models.make_objects((64, 96), torch.device("cpu"))
    for box, mask in zip(objects["boxes"], objects["masks"], strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        extent = torch.tensor([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1])
        assert (box - extent).abs().max() <= 0.5


def test_mistakes(capsys, tmp_path):
    for arguments, message in (
        (["broad", "biformer_nano"], "broad attention is BViT's: bvit_5m, bvit_22m"),
        (["models", "biformer_nanoo"], "unknown model biformer_nanoo"),
        (["models", "fpn/biformer_nano"], "unknown head fpn; choose from semantic_fpn, upernet"),
        (["models", "biformer_nano:gather"], "takes KEY=VALUE, not 'gather'"),
        (["op", "--device", "abacus"], "must be one of cuda, cpu, got abacus"),
        (["all", "--budget", "0", "--device", "cpu"], "--budget must be positive"),
        (["plot", str(tmp_path / "none.json")], "no record at"),
        (["runtimes", "biformer_nanoo"], "invalid choice: 'biformer_nanoo'"),
        (["runtimes", "biformer_nano", "--thread_counts", "0"], "--thread_counts and --batch_sizes must be at least 1"),
        (["int8", "--data_path", str(tmp_path), "--images", "0"], "--images must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            benchmark.parse(arguments)
        assert message in capsys.readouterr().err


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cases_are_measured_while_time_is_left(monkeypatch):
    clock, deadlines = [1000.0], []
    monkeypatch.setattr(suite.time, "time", lambda: clock[0])

    def case(name, takes, needs=0.0, section="s"):
        def measure(trial):
            deadlines.append((trial.deadline, trial.end))
            clock[0] += takes
            return [dict(case=name)]

        return Case(section, name, measure, needs)

    cases = [case("a", 40), case("b", 30), case("needs too much", 1, needs=31), case("c", 40), case("late", 1),
             case("other", 1, section="t")]
    states = [json.loads(json.dumps(found)) for found in suite.run(cases, CPU, (3, 3), budget=100)]
    measured = ["".join(row["case"] for row in state["s"]["rows"]) for state in states]
    assert measured == ["a", "ab", "abc", "abc"]
    assert deadlines == [(pytest.approx(1000 + 100 / 6), 1100), (1040 + 60 / 5, 1100), (1070 + 30 / 3, 1100)]
    assert states[-1]["s"]["left_out"] == ["needs too much", "late"] and states[-1]["s"]["seconds"] == 110
    assert states[-1]["t"] == dict(rows=[], failed={}, left_out=["other"], seconds=0)


def test_a_model_that_would_be_ready_too_late_is_left_out(monkeypatch):
    clock = [0.0]

    def build(*args):
        clock[0] += 40
        return lambda: None

    monkeypatch.setattr(models, "build", build)
    monkeypatch.setattr(timing.time, "time", lambda: clock[0])
    names = ("ours", "reference", "third")
    rows = models.measure([Contender(name) for name in names], "reference", Setting("infer", 1), trial(end=100))
    assert [row.get("failed") for row in rows] == [None, None, timing.NO_TIME]
    assert [row.get("preparation_seconds") for row in rows] == [40, 40, None]


# --- time and memory ------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_each_starting_with_another_contender():
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = timing.interleave(contenders, trial(rounds=4))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # once each, to know how many rounds fit
    assert [len(samples) for samples in seconds.values()] == 3 * [4]


def test_ratios_are_taken_within_a_round():
    # The median of the rates would say 3 / 2; the machine slowed down in the last two rounds for both.
    summary = timing.summarize([1.0, 4.0, 4.0], [2.0, 3.0, 8.0], images=6)
    assert summary["ratio"] == 2 and summary["images_per_second"] == 1.5 and summary["milliseconds"] == 4000
    assert timing.quartiles([1, 2, 3, 4, 5]) == [1.5, 4.5] and summary["quartiles"] == [1.5, 6]
    assert "ratio" not in timing.summarize([1.0, 2.0], None, images=1)


def test_rounds_fill_the_time_within_bounds(monkeypatch):
    monkeypatch.setattr(timing.time, "time", lambda: 100.0)
    for deadline, seconds, rounds in ((110, 0.001, 30), (110, 1, 10), (110, 60, 5), (50, 0.001, 5), (math.inf, 1, 30)):
        assert len(list(Trial(CPU, 5, 30, deadline).turns(["a"], seconds))) == rounds
    assert len(list(Trial(CPU, 5, 30, 50.0, end=60.0).turns(["a"], 1.0))) == 2


def test_a_contender_that_fails_while_timed_is_dropped_and_the_others_are_measured():
    calls = []

    def fails_later():
        calls.append(0)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    attempt = trial(rounds=4)
    seconds = timing.interleave({"bad": fails_later, "good": lambda: None}, attempt)
    assert list(seconds) == ["good"] and len(seconds["good"]) == 4
    assert attempt.failures == {"bad": "out of memory"}


def test_a_gpu_is_timed_by_its_own_clock_behind_a_queue(monkeypatch):
    """On a pretended GPU whose clock each contender moves by its own time."""
    clock, sleeps = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def takes(milliseconds, fails_at=math.inf):
        def contender():
            clock[0] += milliseconds
            if clock[0] > fails_at:
                raise ValueError("too late")

        return contender

    for name, fake in dict(Event=Event, synchronize=lambda device: None, _sleep=sleeps.append,
                           empty_cache=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    attempt = Trial(SimpleNamespace(type="cuda"), 4, 4)
    contenders = dict(a=takes(2.0), b=takes(3.0), bad=takes(0.5, fails_at=12))
    on_device, on_host = timing.interleave_queued(contenders, attempt)
    assert on_device == dict(a=[0.002] * 4, b=[0.003] * 4) and attempt.failures == dict(bad="ValueError: too late")
    assert set(on_host) == {"a", "b"} and all(0 < s < 0.002 for samples in on_host.values() for s in samples)
    assert len(sleeps) == 4 and all(0 <= c <= timing.LONGEST_SLEEP_SECONDS * timing.CLOCK_HZ for c in sleeps)


def test_peak_memory_of_the_cpu_counts_the_tensors_held_at_once():
    def two_of_three():
        a = torch.empty(2**20)
        b = torch.empty(2**20)
        del a
        return b, torch.empty(2**20)

    assert timing.peak_memory(two_of_three, CPU) == pytest.approx(8, rel=0.01)


def test_reasons_are_short_lines():
    assert timing.describe(ValueError("two\n  lines")) == "ValueError: two lines"
    assert len(timing.describe(ValueError("x" * 1000))) == 160
    assert timing.describe(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out of memory"


# --- attention ------------------------------------------------------------------------------------------------------


def test_work_and_floor():
    # 5 x 6 in 2 x 2 regions of 3 x 3: the lower ones hold 2 x 3 real tokens.
    routes = torch.tensor([[[0, 1], [2, 3], [0, 2], [3, 1]]])
    case = AttentionCase("", 1, 5, 6, 2, 2, 2, FORWARD, head_dim=4, dtype=torch.bfloat16)
    pairs = 9 * 18 + 9 * 12 + 6 * 15 + 6 * 15
    assert attention.work(case, routes) == dict(bytes=4 * 30 * 8 * 2 + 4 * 2 * 8, operations=2 * 2 * pairs * 2 * 4)
    backward = attention.work(AttentionCase(**dict(vars(case), mode=BACKWARD)), routes)
    assert backward == dict(bytes=12 * 30 * 8 * 2 + 4 * 2 * 8, operations=7 * 2 * pairs * 2 * 4)
    rows = [dict(bytes=1000, operations=6000, milliseconds=6.0), dict(failed="out of memory")]
    for bytes_per_second, floor in ((1e6, 3), (1e5, 10)):
        attention.add_floors(rows, dict(bytes_per_second=bytes_per_second, operations_per_second=2e6))
        assert rows[0]["floor_milliseconds"] == floor and rows[0]["times_floor"] == 6 / floor
    assert rows[1] == dict(failed="out of memory")


def test_inputs_are_several_times_the_cache():
    case = AttentionCase("", 1, 64, 64, 2, 2, 2, FORWARD, dtype=torch.float32)  # 1 MiB a map
    sets = case.inputs(CPU)
    assert len(sets) == attention.CACHES * attention.CPU_CACHE_BYTES // (4 * 2**20)
    assert not torch.equal(sets[0][0], sets[1][0]) and sets[0][0].shape == (1, 64, 64, 2, 32)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_attention_rows_and_reasons(mode):
    case = AttentionCase("s", 2, 9, 10, 2, 3, 2, mode, ("gather", "masked", "dense", "abacus"), 8, torch.float32)
    gather, masked, dense, abacus = attention.measure(case, trial())
    assert [row["impl"] for row in (gather, masked, dense, abacus)] == list(case.contenders)
    assert abacus["failed"].startswith("there is no such implementation") and masked["error"] < 1e-6
    assert gather["ratio"] == 1 and gather["error"] < 1e-6 and gather["output_repeats"] and dense["ratio"] > 0
    assert ("gradients_repeat" in gather) == (mode == BACKWARD) and "error" not in dense
    assert gather["images_per_second"] == pytest.approx(2e3 / gather["milliseconds"])


def test_a_wrong_an_unsteady_and_a_failing_result_are_noticed(monkeypatch):
    def broken(*args, impl, **kwargs):
        if impl == "triton":
            raise RuntimeError("no kernel image")
        out = routed_attention(*args, impl="gather", **kwargs)
        return out if impl == "gather" else out + torch.rand(()) * args[0].mean()

    monkeypatch.setattr(attention, "routed_attention", broken)
    monkeypatch.setattr(attention, "unsupported", lambda impl, query: None)
    case = AttentionCase("s", 2, 8, 8, 2, 2, 2, BACKWARD, ("triton", "gather", "masked"), 8, torch.float32)
    triton, gather, masked = attention.measure(case, trial())
    assert triton["failed"] == "RuntimeError: no kernel image"
    assert gather["output_repeats"] and gather["gradients_repeat"] and gather["error"] < 1e-6
    assert not masked["output_repeats"] and masked["error"] > 1e-3


def test_nan_is_an_error():
    good, bad = torch.ones(1, 3), torch.tensor([[1.0, float("nan"), 1.0]])
    assert attention.relative_error((good, good), (good, 2 * good)) == 0.5
    assert math.isnan(attention.relative_error((bad, good), (good, good)))


@pytest.mark.parametrize("size, regions, block", [((16, 16), 2, 64), ((16, 32), 2, 128), ((13, 30), 3, 128)])
def test_flex_attention_is_routed_attention(size, regions, block):
    grid = RegionGrid.fit(*size, regions)
    assert flex.block_size(grid) == block
    query, key, value = torch.randn(2, *size, 3, 2, 16, generator=torch.Generator().manual_seed(0)).unbind(3)
    routing = route_regions(query, key, grid, grid, 2)
    mask = flex.block_mask(routing.routes, grid)
    ordered = [flex.to_regions(x, grid) for x in (query, key, value)]
    torch.testing.assert_close(flex.from_regions(ordered[0], grid), query, rtol=0, atol=0)
    out = flex.from_regions(flex_attention(*ordered, block_mask=mask), grid)
    torch.testing.assert_close(out, routed_attention(query, key, value, routing, impl="gather"))

    # The blocks, which uncompiled flex_attention does not look at, say the same as the mask of single tokens.
    length = ordered[0].shape[2]
    index = torch.arange(length)
    pairs = mask.mask_mod(torch.arange(2)[:, None, None], 0, index[:, None], index)
    by_block = pairs.unflatten(2, (-1, block)).unflatten(1, (-1, block)).transpose(2, 3).flatten(3)
    real = torch.nn.functional.pad(grid.is_real().flatten(), (0, length - grid.is_real().numel()))
    # Queries that are padding need no blocks.
    some = by_block.unflatten(3, (block, block)) & real.unflatten(0, (-1, block))[:, None, :, None]
    assert torch.equal(mask.to_dense()[:, 0].bool(), some.flatten(3).any(3))
    full = torch.zeros_like(mask.to_dense()[:, 0], dtype=torch.bool)
    for b, row in torch.cartesian_prod(torch.arange(2), torch.arange(full.shape[1])):
        full[b, row, mask.full_kv_indices[b, 0, row, : mask.full_kv_num_blocks[b, 0, row]].long()] = True
    assert torch.equal(full, by_block.all(3)) if not grid.is_padded else not (full & ~by_block.all(3)).any()


def test_the_shapes_of_the_op():
    cases = suite.attention_cases(suite.SCALES["cuda"])
    shapes = [(c.stage, c.height, c.width, c.heads, c.topk, c.regions) for c in cases if c.mode == FORWARD]
    assert shapes[:6] == [
        ("224, stage 1", 56, 56, 2, 1, 7), ("224, stage 2", 28, 28, 4, 4, 7), ("224, stage 3", 14, 14, 8, 16, 7),
        ("800 x 1333, finer regions, stage 1", 200, 334, 2, 1, 16),
        ("800 x 1333, finer regions, stage 2", 100, 167, 4, 4, 16),
        ("800 x 1333, finer regions, stage 3", 50, 84, 8, 16, 16),
    ]
    assert [regions for *_, regions in shapes[6:]] == 6 * [7] and shapes[9][3] == 3


# --- models and the profile -----------------------------------------------------------------------------------------


def test_broad_attention_is_what_was_published():
    qkvs = list(torch.randn(4, 2, 7, 3 * 3 * 8, dtype=torch.float64))
    torch.testing.assert_close(broad_attention(qkvs, 3), models.concatenated(qkvs, 3))


@pytest.mark.slow
def test_the_batch_is_halved_until_it_fits(monkeypatch):
    def build(contender, setting, device):
        if setting.batch > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if contender.model == "broken":
            raise ValueError("no such size")
        return lambda: None

    monkeypatch.setattr(models, "build", build)
    monkeypatch.setattr(models, "GROWTH_REFERENCE", "good")
    monkeypatch.setattr(models, "growing_contenders", lambda size: (Contender("good"), Contender("broken")))
    good, broken = models.measure_growth(Setting("infer", 12), trial())
    assert good["batch"] == 3 and good["ratio"] == 1
    assert good["images_per_second"] == pytest.approx(1e3 / good["milliseconds"])
    assert broken["failed"] == "ValueError: no such size"


def test_growing_regions_keep_their_size():
    by_label = {contender.name: dict(contender.kwargs) for contender in models.growing_contenders((896, 896))}
    assert by_label["biformer_tiny, regions of a fixed size"] == dict(num_regions=28)


def test_kernels_are_grouped_by_their_names_and_callers():
    for group, names in {
        "GEMM": ["nvjet_tst_128x256", "aten::addmm", "aten::linear"],
        "attention": ["_forward_kernel", "routed::attention_forward"],
        "layer norm": ["vectorized_layer_norm_kernel", "aten::native_layer_norm"],
        "batch norm": ["cudnn::bn_fw_tr_1C11", "aten::cudnn_batch_norm"],
        "optimizer": ["multi_tensor_apply_kernel", "aten::_fused_adamw_", "Optimizer.step#AdamW.step"],
        "elementwise and copies": ["vectorized_elementwise_kernel", "aten::gelu"],
        breakdown.OTHER: ["a_kernel"],
    }.items():
        assert breakdown.group_of(names, depthwise=False) == group, names
    assert breakdown.group_of(["cutlass", "aten::convolution"], depthwise=False) == breakdown.CONVOLUTION
    assert breakdown.group_of(["cutlass", "aten::convolution"], depthwise=True) == breakdown.DEPTHWISE


@pytest.mark.parametrize("layer", layers.LAYERS)
def test_layers_are_measured_beside_pytorchs(layer):
    case = layers.LayerCase(layer, "stage 1", 2, 6, 16, torch.float32)
    one, two = (layers.build(case, "torch", CPU)() for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, two, strict=True)), "both implementations get the same inputs"
    maps = 2 if layer in (layers.ADD_NORM, layers.LOCAL) else 1
    outs = 2 if layer == layers.ADD_NORM else 1
    assert len(one) == outs + maps + 2
    reference, fused = layers.measure(case, trial())
    assert reference["impl"] == "torch" and reference["ratio"] == 1 and reference["milliseconds"] > 0
    assert "failed" in fused or fused["milliseconds"] > 0


def test_our_kernels_are_grouped_by_their_own_names():
    """Eager calls launch them from autograd functions, whose names say nothing of them."""
    pytest.importorskip("triton")
    modules = {
        "attention": "ops.impl.triton.kernels", "routing": "ops.impl.triton.routes",
        "layer norm": "ops.fused.layer_norm", breakdown.DEPTHWISE: "ops.fused.depthwise_kernels",
    }
    for group, name in modules.items():
        kernels = [kernel for kernel in vars(importlib.import_module(name)) if kernel.endswith("_kernel")]
        assert kernels
        for kernel in kernels:
            assert breakdown.group_of([kernel, "_PackedBackward"], depthwise=False) == group, kernel


def test_device_time_goes_to_the_op_that_launched_it():
    def event(name, parent=None, kernels=(), shapes=(), device=DeviceType.CPU):
        return SimpleNamespace(name=name, cpu_parent=parent, kernels=kernels, input_shapes=list(shapes),
                               device_type=device, is_user_annotation=False, self_cpu_time_total=7)

    kernel = SimpleNamespace(name="implicit_gemm", duration=5.0)
    convolution = event("aten::convolution", shapes=([2, 8, 4, 4], [8, 1, 5, 5]))
    events = [
        convolution, event("aten::cudnn_convolution", convolution, [kernel]),
        event("aten::mm", None, [kernel, kernel]), event("implicit_gemm", device=DeviceType.CUDA),
    ]
    groups, kernels = breakdown.attribute(events, on_gpu=True)
    assert groups == {breakdown.DEPTHWISE: 5.0, "GEMM": 10.0} and kernels["GEMM", "implicit_gemm"] == 10.0
    assert sum(breakdown.attribute(events, on_gpu=False)[0].values()) == 21


def test_busy_time_is_the_length_of_the_union():
    assert breakdown.busy_microseconds([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


@pytest.mark.slow
def test_the_breakdown_of_a_step_adds_up():
    step, *rows = breakdown.measure(Contender("biformer_nano"), Setting("train", 1, (64, 64)), trial())
    of_groups = {row["name"]: row["share"] for row in rows if row["kind"] == "group"}
    assert sum(of_groups.values()) == pytest.approx(1) and step["idle_share"] is None
    assert all(of_groups[group] > 0 for group in breakdown.GROUPS if group != breakdown.CONVOLUTION)
    assert of_groups.get(breakdown.OTHER, 0) < 0.25


# --- tables and the plot --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.json")), ids=lambda path: path.stem)
def test_committed_records_become_tables(path):
    record = json.loads(path.read_text())
    text = tables.document(record)
    sections = record.get("sections") or {"": dict(rows=record["results"])}
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| --- ")]
    heads = text.count("| --- |\n")
    rows = sum(len(found["rows"]) for name, found in sections.items() if name != "ceilings")
    assert len(lines) == heads + rows + len(record.get("cores", []))
    assert record["machine"]["device"] in text
    if sections.get("growth", {}).get("rows"):
        assert tables.growth_figure(record).axes


def test_tables_say_what_failed_and_what_was_left_out():
    row = dict(stage="s", case="c", impl="triton", mode=FORWARD, auto=False, failed="a | b")
    found = dict(rows=[row], failed={"t": "no reference"}, left_out=["u"])
    text = tables.document(dict(machine=dict(device="Chip", cores=2, torch="2", date="today"),
                                sections=dict(attention=found)))
    assert "| a / b |" in text and "Failed: t: no reference" in text and "Left out for lack of time: u." in text
    assert [tables.number(x) for x in (0.01234, 0.5, 1.234, 12.34, 1234.5, 2e-6, 0)] == [
        "0.0123", "0.500", "1.23", "12.3", "1234", "2.00e-06", "0"
    ]


def test_the_plot_shows_each_model_and_mode():
    rows = [
        dict(model=model, mode=mode, size=str(side), pixels=side**2, milliseconds=side / 100, mb_per_image=side / 10)
        for model in ("a", "b") for mode in ("train", "infer") for side in (448, 224)
    ]
    rows.append(dict(model="c", mode="train", size="224", pixels=224**2, failed="out of memory"))
    figure = tables.growth_figure(dict(machine=dict(device="Chip"), sections=dict(growth=dict(rows=rows))))
    time_axes, memory_axes = figure.axes
    assert [list(line.get_xdata()) for line in time_axes.lines] == [[224, 448]] * 4
    assert list(memory_axes.lines[0].get_ydata()) == [22.4, 44.8]
    assert "pixels" in time_axes.get_xlabel() and "ms" in time_axes.get_ylabel() and "MiB" in memory_axes.get_ylabel()
    with pytest.raises(ValueError, match="no results of growing images"):
        tables.growth_figure(dict(machine={}, sections={}))
