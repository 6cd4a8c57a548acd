import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.attention.flex_attention import flex_attention

from helpers.faulty_tasks import measure as faulty
from models.bvit import broad_attention
from ops import RegionGrid, route_regions, routed_attention
from scripts import benchmark
from scripts.bench import (
    attention,
    breakdown,
    broad,
    ceilings,
    flex,
    goals,
    growth,
    networks,
    plot,
    session,
    suite,
    tables,
)
from scripts.bench import timing as timing_
from scripts.bench.attention import BACKWARD, FORWARD, AttentionCase
from scripts.bench.networks import Contender, Group, Setting
from scripts.bench.session import Section, Task
from scripts.bench.trial import NO_TIME, DeviceLost, Trial, describe

CPU = torch.device("cpu")
QUICK = dict(least_rounds=3, most_rounds=3)


def run(tmp_path, capsys, *arguments):
    benchmark.main([*arguments, "--rounds", "3", "--device", "cpu", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text()), capsys.readouterr().out


# --- the commands ---------------------------------------------------------------------------------------------------


def test_models(tmp_path, capsys):
    record, out = run(tmp_path, capsys, "models", "biformer_nano", "--reference", "resnet10t", "--input_size", "32",
                      "--batch_size", "2")
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


def test_op(tmp_path, capsys):
    record, out = run(tmp_path, capsys, "op", "--batch_size", "1", "--scales", "0.25", "--modes", "train",
                      "--contenders", "gather", "masked", "dense")
    assert [r["impl"] for r in record["results"]] == 3 * ["gather", "masked", "dense"]
    assert sum(r["auto"] for r in record["results"]) == 3 and out.count("(auto)") == 3
    for result in record["results"]:
        assert result["output_repeats"] and result.get("error", 0) < 1e-5


def test_broad(tmp_path, capsys):
    record, out = run(tmp_path, capsys, "broad", "bvit_5m", "--batch_size", "1")
    assert [r["part"] for r in record["results"]] == [broad.NETWORK, "class token", "all tokens", broad.CONCATENATED]
    assert all(r["milliseconds"] > 0 and f"| {r['part']} |" in out for r in record["results"])
    memory = {r["part"]: r["peak_memory_mb"] for r in record["results"]}
    assert memory["class token"] < memory["all tokens"] < memory[broad.CONCATENATED]


def test_broad_attention_is_what_was_published():
    qkvs = list(torch.randn(4, 2, 7, 3 * 3 * 8, dtype=torch.float64))
    torch.testing.assert_close(broad_attention(qkvs, 3), broad.concatenated(qkvs, 3))


def test_mistakes(capsys, tmp_path):
    for arguments, message in (
        (["broad", "biformer_nano"], "broad attention is BViT's: bvit_5m, bvit_22m"),
        (["models", "biformer_nanoo"], "unknown model biformer_nanoo"),
        (["op", "--device", "abacus"], "must be one of cuda, cpu, got abacus"),
        (["all", "--budget", "0", "--device", "cpu"], "--budget must be positive"),
        (["plot", str(tmp_path / "none.json")], "no record at"),
    ):
        with pytest.raises(SystemExit):
            benchmark.parse(arguments)
        assert message in capsys.readouterr().err


def test_all(tmp_path, capsys, monkeypatch):
    case = AttentionCase("224, stage 1", 1, 14, 14, 2, 7, 4, BACKWARD, ("gather", "dense"), dtype=torch.float32)
    pair = tuple(Contender(model) for model in ("biformer_nano", "resnet10t"))
    setting = Setting("infer", 1, 32)
    small = [
        Section("ceilings", 1, (Task("c", ceilings.measure, ceilings.Ceilings(2**20, 64, torch.float32)),)),
        Section("attention", 1, (Task("a", attention.measure, case),)),
        Section("models", 1, (Task("m", networks.measure, Group(pair, "resnet10t", setting)),)),
        Section("growth", 1, (Task("g", growth.measure, growth.Size(pair, "resnet10t", setting)),)),
        Section("breakdown", 1, (Task("b", breakdown.measure, breakdown.Step(pair[0], Setting("train", 2, 32))),)),
    ]
    monkeypatch.setattr(suite, "sections", lambda scale: small)
    benchmark.main(["all", "--device", "cpu", "--threads", "1", "--budget", "300", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert all(found["failed"] == {} and found["left_out"] == [] for found in record["sections"].values()), out
    assert path.with_suffix(".md").read_text() in out and path.with_suffix(".png").stat().st_size > 10_000
    for title in ("Attention", "Models", "Growing images", "A training step", "Goals"):
        assert f"## {title}" in out
    row = goals.find(record["sections"]["attention"]["rows"], impl="gather")
    assert row["times_floor"] == pytest.approx(row["milliseconds"] / row["floor_milliseconds"])
    path.with_suffix(".png").unlink()
    benchmark.main(["plot", str(path)])
    assert path.with_suffix(".png").exists()


# --- time and memory ------------------------------------------------------------------------------------------------


def test_peak_memory_of_the_cpu_is_that_of_the_tensors_held_at_once():
    def two_of_three():
        a = torch.empty(2**20)
        b = torch.empty(2**20)
        del a
        return b, torch.empty(2**20)

    assert timing_.peak_memory(two_of_three, CPU) == pytest.approx(8, rel=0.01)


def test_ratios_are_taken_within_a_round():
    # The median of the rates would say 3 / 2; the machine slowed down in the last two rounds for both.
    summary = timing_.summarize([1.0, 4.0, 4.0], [2.0, 3.0, 8.0], images=6)
    assert summary["ratio"] == 2 and summary["images_per_second"] == 1.5 and summary["milliseconds"] == 4000
    assert "ratio" not in timing_.summarize([1.0, 2.0], None, images=1)


def test_rounds_fill_the_time_within_bounds(monkeypatch):
    monkeypatch.setattr("scripts.bench.trial.time.time", lambda: 100.0)
    trial = Trial(CPU, deadline=110.0, least_rounds=5, most_rounds=30)
    assert [timing_.rounds_for(s, trial) for s in (0.001, 1.0, 60.0)] == [30, 10, 5]
    trial.deadline = 50.0
    assert timing_.rounds_for(0.001, trial) == 5


def test_a_contender_that_fails_while_timed_is_dropped_and_the_others_go_on():
    calls = []

    def fails_later():
        calls.append(0)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    trial = Trial(CPU, least_rounds=4, most_rounds=4)
    seconds = timing_.interleave({"bad": fails_later, "good": lambda: None}, trial)
    assert list(seconds) == ["good"] and len(seconds["good"]) == 4
    assert trial.failures == {"bad": "out of memory"}


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
    trial = Trial(SimpleNamespace(type="cuda"), least_rounds=4, most_rounds=4)
    contenders = dict(a=takes(2.0), b=takes(3.0), bad=takes(0.5, fails_at=12))
    on_device, on_host = timing_.interleave_queued(contenders, trial)
    assert on_device == dict(a=[0.002] * 4, b=[0.003] * 4) and trial.failures == dict(bad="ValueError: too late")
    assert set(on_host) == {"a", "b"} and all(0 < s < 0.002 for samples in on_host.values() for s in samples)
    assert len(sleeps) == 4 and all(0 <= cycles <= timing_.LONGEST_SLEEP * timing_.CLOCK_HZ for cycles in sleeps)


def test_a_lost_device_ends_the_trial(monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("scripts.bench.trial.release", lost)
    with pytest.raises(DeviceLost, match="triton: RuntimeError: misaligned"), Trial(CPU).guard("triton"):
        raise RuntimeError("misaligned")


def test_inputs_are_several_times_the_cache():
    cache = timing_.CPU_CACHE_BYTES
    assert timing_.input_sets(100 * cache, CPU) == 1
    assert timing_.input_sets(cache // 2, CPU) == 2 * timing_.CACHES


def test_reasons_are_short_lines():
    assert describe(ValueError("two\n  lines")) == "ValueError: two lines"
    assert len(describe(ValueError("x" * 1000))) == 160
    assert describe(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out of memory"


# --- the session ----------------------------------------------------------------------------------------------------


def test_a_contender_that_kills_or_hangs_the_process_is_one_that_failed():
    worker = session.Worker(CPU)
    contenders = ("good", "raises", "dies", "hangs", "last")
    try:
        far = session.time.time() + 100
        outcome = worker.measure(Task("t", faulty, contenders, patience=0.5), far, far, far)
        broken = worker.measure(Task("t", faulty, ("good", "breaks the task"), patience=0.5), far, far, far)
    finally:
        worker.stop()
    assert {row["name"]: row["failed"] for row in outcome["rows"]} == dict(
        good=None, raises="RuntimeError: no such kernel", dies="the process died (exit code 3)",
        hangs="no answer in 0 s", last=None,
    )
    assert broken == dict(failed="ValueError: no such case")


def test_the_budget_ends_everything(monkeypatch):
    worker = session.Worker(CPU)
    monkeypatch.setattr(worker, "_start", lambda end: None)
    monkeypatch.setattr(worker, "stop", lambda patience=0: None)
    worker.process, worker.connection = object(), SimpleNamespace(send=lambda x: None, poll=lambda seconds: False)
    now = session.time.time()
    assert worker.measure(Task("t", faulty, (), patience=60), now, now, end=now + 1) == dict(failed=NO_TIME)


class FakeWorker:
    """Tasks whose case is the seconds that they take, on a clock of its own."""

    def __init__(self, clock):
        self.clock = clock
        self.deadlines = []

    def measure(self, task, deadline, section_deadline, end):
        self.deadlines.append((deadline, section_deadline, end))
        self.clock[0] += task.case
        return dict(rows=[dict(task=task.name)])

    def stop(self, patience):
        pass


def test_sections_keep_to_their_parts_and_hand_on_what_they_leave(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(session.time, "time", lambda: clock[0])
    sections = [
        Section("a", 1, tuple(Task(f"a{i}", faulty, 30.0) for i in range(4))),
        Section("b", 1, (Task("b0", faulty, 5.0),)),
        Section("c", 2, (Task("c0", faulty, 1.0), Task("c1", faulty, 1.0))),
    ]
    record, saved = dict(sections={}), []
    worker = FakeWorker(clock)
    session.run(sections, worker, 1000.0, 200.0, record, lambda r: saved.append(json.dumps(r)))
    # a: 50 s of 200, so that its second task is its last; b: a third of the 140 left; c: all of the 135 left.
    assert record["sections"]["a"]["left_out"] == ["a2", "a3"]
    assert [row["task"] for row in record["sections"]["a"]["rows"]] == ["a0", "a1"]
    assert worker.deadlines == [
        (1012.5, 1050, 1200), (pytest.approx(1030 + 20 / 3), 1050, 1200),
        (pytest.approx(1060 + 140 / 3), pytest.approx(1060 + 140 / 3), 1200),
        (1065 + 135 / 2, 1200, 1200), (1200, 1200, 1200),
    ]
    assert record["sections"]["c"]["seconds"] == 2
    assert len(saved) == 6 and '"a0"' in saved[0] and '"a1"' not in saved[0]


def test_a_record_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "record.json"
    session.write_json(path, dict(a=1))
    with pytest.raises(TypeError):
        session.write_json(path, dict(a=object()))
    assert json.loads(path.read_text()) == dict(a=1)


def test_the_suites_can_be_sent_to_a_process_and_name_each_task_once():
    for scale in suite.SCALES.values():
        for section in suite.sections(scale):
            assert len({task.name for task in section.tasks}) == len(section.tasks) > 0
            pickle.loads(pickle.dumps(section))
    cases = suite.attention_cases(suite.SCALES["cuda"])
    photos = [(c.height, c.width, c.heads, c.topk, c.regions) for c in cases if "800" in c.stage and c.mode == FORWARD]
    assert photos[:3] == [(200, 334, 2, 1, 16), (100, 167, 4, 4, 16), (50, 84, 8, 16, 16)]
    assert [regions for *_, regions in photos[3:]] == [7, 7, 7]
    stages = {case.stage for case in cases}
    assert {f"{of} {i}" for of in (goals.AT_224, goals.AT_800) for i in goals.STAGES} <= stages


# --- attention ------------------------------------------------------------------------------------------------------


def test_work_and_floor():
    # 5 x 6 in 2 x 2 regions of 3 x 3: the lower ones hold 2 x 3 real tokens.
    grid = RegionGrid(5, 6, 2, 2)
    routes = torch.tensor([[[0, 1], [2, 3], [0, 2], [3, 1]]])
    assert attention.routed_pairs(routes, grid, grid) == 9 * 18 + 9 * 12 + 6 * 15 + 6 * 15
    case = AttentionCase("", 1, 5, 6, 2, 2, 2, FORWARD, head_dim=4, dtype=torch.bfloat16)
    least = attention.work(case, routes)
    assert least == dict(bytes=4 * 30 * 8 * 2 + 4 * 2 * 8, operations=2 * 2 * 450 * 2 * 4)
    backward = attention.work(AttentionCase(**dict(vars(case), mode=BACKWARD)), routes)
    assert backward == dict(bytes=12 * 30 * 8 * 2 + 4 * 2 * 8, operations=7 * 2 * 450 * 2 * 4)
    row = dict(bytes=1000, operations=6000)
    assert ceilings.floor_milliseconds(row, dict(bytes_per_second=1e6, operations_per_second=2e6)) == 3
    assert ceilings.floor_milliseconds(row, dict(bytes_per_second=1e5, operations_per_second=2e6)) == 10


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
def test_attention_rows_and_reasons(mode):
    case = AttentionCase("s", 2, 9, 10, 2, 3, 2, mode, ("gather", "masked", "dense", "abacus"), 8, torch.float32)
    rows = attention.measure(case, Trial(CPU, **QUICK, failures={"masked": "the process died"}))
    assert [row["impl"] for row in rows] == ["gather", "masked", "dense", "abacus"]
    gather, masked, dense, abacus = rows
    assert masked["failed"] == "the process died" and abacus["failed"].startswith("there is no such implementation")
    assert gather["ratio"] == 1 and gather["error"] < 1e-6 and gather["output_repeats"] and dense["ratio"] > 0
    assert ("gradients_repeat" in gather) == (mode == BACKWARD) and "error" not in dense
    assert gather["images_per_second"] == pytest.approx(2e3 / gather["milliseconds"])


def test_a_wrong_or_unsteady_result_is_noticed(monkeypatch):
    def unsteady(query, key, value, routing, impl):
        out = routed_attention(query, key, value, routing)
        return out if impl == "gather" else out + torch.rand(()) * query.mean()

    monkeypatch.setattr(attention, "routed_attention", unsteady)
    case = AttentionCase("s", 2, 8, 8, 2, 2, 2, BACKWARD, ("gather", "masked"), 8, torch.float32)
    gather, masked = attention.measure(case, Trial(CPU, **QUICK))
    assert gather["output_repeats"] and gather["gradients_repeat"] and gather["error"] < 1e-6
    assert not masked["output_repeats"] and masked["error"] > 1e-3


def test_nan_is_an_error():
    good, bad = torch.ones(1, 3), torch.tensor([[1.0, float("nan"), 1.0]])
    assert attention.relative_error((good, good), (good, 2 * good)) == 0.5
    assert math.isnan(attention.relative_error((bad, good), (good, good)))
    assert goals._wrong(dict(error=float("nan"))) and not goals._wrong(dict(error=0.01))


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


# --- growth and the profile -----------------------------------------------------------------------------------------


def test_the_batch_is_halved_until_it_fits(monkeypatch):
    def build(contender, setting, device):
        if setting.batch > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if contender.model == "broken":
            raise ValueError("no such size")
        return lambda: None, None

    monkeypatch.setattr(growth, "build", build)
    size = growth.Size((Contender("good"), Contender("broken")), "good", Setting("infer", 12))
    good, broken = growth.measure(size, Trial(CPU, **QUICK))
    assert good["batch"] == 3 and good["ratio"] == 1
    assert broken["failed"] == "ValueError: no such size"


def test_growing_regions_keep_their_size():
    by_label = {contender.name: dict(contender.kwargs) for contender in growth.contenders_at(896)}
    assert by_label["biformer_tiny, regions of a fixed size"] == dict(num_regions=28)


def test_kernels_are_grouped_by_their_names_and_callers():
    for group, names in {
        breakdown.PRODUCTS: ["nvjet_tst_128x256", "aten::addmm", "aten::linear"],
        breakdown.ATTENTION: ["_forward_kernel", "routed::attention_forward"],
        breakdown.LAYER_NORM: ["vectorized_layer_norm_kernel", "aten::native_layer_norm"],
        breakdown.BATCH_NORM: ["cudnn::bn_fw_tr_1C11", "aten::cudnn_batch_norm"],
        breakdown.OPTIMIZER: ["multi_tensor_apply_kernel", "aten::_fused_adamw_", "Optimizer.step#AdamW.step"],
        breakdown.ELEMENTWISE: ["vectorized_elementwise_kernel", "aten::gelu"],
        breakdown.OTHER: ["a_kernel"],
    }.items():
        assert breakdown.group_of(names, depthwise=False) == group, names
    assert breakdown.group_of(["cutlass", "aten::convolution"], depthwise=False) == breakdown.CONVOLUTION
    assert breakdown.group_of(["cutlass", "aten::convolution"], depthwise=True) == breakdown.DEPTHWISE


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
    assert groups == {breakdown.DEPTHWISE: 5.0, breakdown.PRODUCTS: 10.0}
    assert kernels[breakdown.PRODUCTS, "implicit_gemm"] == 10.0
    assert sum(breakdown.attribute(events, on_gpu=False)[0].values()) == 21


def test_busy_time_is_that_of_the_union():
    assert breakdown.busy_microseconds([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_the_breakdown_of_a_step_adds_up():
    step, *rows = breakdown.measure(breakdown.Step(Contender("biformer_nano"), Setting("train", 1, 64)),
                                    Trial(CPU, **QUICK))
    of_groups = {row["name"]: row["share"] for row in rows if row["kind"] == "group"}
    assert sum(of_groups.values()) == pytest.approx(1) and step["idle_share"] is None
    for group in (breakdown.ATTENTION, breakdown.PRODUCTS, breakdown.DEPTHWISE, breakdown.LAYER_NORM,
                  breakdown.OPTIMIZER, breakdown.BATCH_NORM, breakdown.ELEMENTWISE):
        assert of_groups[group] > 0
    assert of_groups.get(breakdown.OTHER, 0) < 0.25


# --- what is said of it ---------------------------------------------------------------------------------------------


def attention_rows(**changes):
    fused = dict(impl="triton", ratio=5.0, peak_memory_mb=9.0, times_floor=1.5, error=0.005, output_repeats=True,
                 gradients_repeat=True)
    rows = []
    for stage in ("224, stage 1", "224, stage 2", "224, stage 3", "800 x 1333, finer regions, stage 1"):
        for mode in (FORWARD, BACKWARD):
            rows.append(dict(fused, **changes, stage=stage, mode=mode))
            rows.append(dict(impl="gather", stage=stage, mode=mode, ratio=1.0, peak_memory_mb=100.0, error=0.004))
    return rows


@pytest.mark.parametrize("changes, outcomes", [
    (dict(), ["met", "met", "met", "met"]),
    (dict(ratio=3.9), ["missed", "met", "met", "met"]),
    (dict(peak_memory_mb=11.0), ["met", "missed", "met", "met"]),
    (dict(times_floor=2.1), ["met", "met", "missed", "met"]),
    (dict(gradients_repeat=False), ["met", "met", "met", "missed"]),
    (dict(error=0.4), ["missed: wrong by 0.4"] * 3 + ["met"]),
    (dict(failed="needs a GPU"), ["not measured: triton: needs a GPU"] * 3 + ["not measured: needs a GPU"]),
])
def test_attention_goals(changes, outcomes):
    judged = goals.attention_goals(attention_rows(**changes))
    found = {goal["goal"]: goal["outcome"] for goal in judged}
    assert outcomes == [
        found["224, stage 2: forward + backward at least 4 times as fast as gather"],
        found["800 x 1333, finer regions, stage 1: forward + backward in at most a tenth of gather's extra memory"],
        found["224, stage 1: forward in at most twice the floor"],
        found["triton: two launches give bit-equal gradients in every case"],
    ]
    missing = found["800 x 1333, finer regions, stage 2: forward + backward at least 4 times as fast as gather"]
    assert missing == "not measured: triton: no such row"


def test_model_goals():
    rows = [
        dict(model="biformer_small", mode="train", compiled=False, ratio=1.2),
        dict(model="biformer_small", mode="infer", compiled=False, ratio=0.9),
        dict(model="biformer_tiny", mode="train", compiled=False, failed="out of memory"),
        dict(model="biformer_tiny", mode="infer", compiled=False),
        dict(model="biformer_tiny", mode="infer", compiled=True, ratio=1.1),
    ]
    assert [goal["outcome"] for goal in goals.model_goals(rows)] == [
        "met", "missed", "not measured: out of memory", "not measured: swin_tiny failed", "met"
    ]


def test_compiling_is_not_begun_without_the_time_for_the_reference_too(monkeypatch):
    pair = (Contender("biformer_nano"), Contender("resnet10t"))
    group = Group(pair, "resnet10t", Setting("infer", 1, 32, compile=True), compile_seconds=60)
    rows = networks.measure(group, Trial(CPU, section_deadline=networks.time.time() + 100, **QUICK))
    assert [row["failed"] for row in rows] == [NO_TIME, NO_TIME]


def test_tables_say_what_failed_and_what_was_left_out():
    row = dict(stage="s", case="c", impl="triton", mode=FORWARD, auto=False, failed="a | b")
    record = dict(
        machine=dict(device="Chip", cores=2, torch="2", date="today"),
        sections=dict(
            attention=dict(rows=[row, dict(row, failed="second time")], failed={"t": "no reference"}, left_out=["u"])
        ),
    )
    text = tables.document(record)
    assert "a / b" in text and "second time" not in text
    assert "Failed: t: no reference" in text and "Left out for lack of time: u." in text
    assert [tables.number(x) for x in (0.01234, 0.5, 1.234, 12.34, 1234.5, 2e-6, None)] == [
        "0.0123", "0.500", "1.23", "12.3", "1234", "2.00e-06", ""
    ]


def test_the_plot_shows_each_model_and_mode():
    rows = [
        dict(model=model, mode=mode, side=side, milliseconds=side / 100, mb_per_image=side / 10)
        for model in ("a", "b") for mode in ("train", "infer") for side in (448, 224)
    ]
    rows.append(dict(model="c", mode="train", side=224, failed="out of memory"))
    record = dict(machine=dict(device="Chip"), sections=dict(growth=dict(rows=rows)))
    figure = plot.growth_figure(record)
    time_axes, memory_axes = figure.axes
    assert [list(line.get_xdata()) for line in time_axes.lines] == [[224, 448]] * 4
    assert list(memory_axes.lines[0].get_ydata()) == [22.4, 44.8]
    assert "pixels" in time_axes.get_xlabel() and "ms" in time_axes.get_ylabel() and "MiB" in memory_axes.get_ylabel()
    with pytest.raises(ValueError, match="no results of growing images"):
        plot.growth_figure(dict(machine={}, sections={}))
