"""Compiled runs: as exact as others when they resume, one graph for all steps, and refused in one line where needed."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from torch._dynamo.utils import counters

import main as program
import models  # noqa: F401
from helpers import ROOT
from helpers.photos import write_photos
from helpers.ports import free_port
from helpers.run_state import differences
from tasks.classification.token_labels import label_map_path
from training.advice import with_advice
from training.compiler import NoCompilerError, check_compiler
from training.signals import fault_of

CPU = torch.device("cpu")
# With mixup, cutmix, repeated augmentation and EMA weights, as by default; two epochs of three steps, on 13 images for
# each process.
COMMAND = [
    "--input_size", "32", "--batch_size", "2", "--update_freq", "2", "--num_workers", "0", "--device", "cpu",
    "--epochs", "2", "--warmup_epochs", "1", "--lr", "1e-2", "--log_every", "1", "--model_ema_eval",
    "--model_ema_decay", "0.9", "--clip_grad", "1", "--drop_path", "0.2", "--compile",
]
# Two blocks, of routed and of full attention: a block more takes seconds more to compile.
BIFORMER = ["--model", "biformer_nano", "--model_kwargs", "depths=(1,0,0,1)"]
DEBIFORMER = ["--model", "debiformer_tiny", "--model_kwargs", "depths=(0,0,1,0)"]


@pytest.fixture(scope="module")
def compiler():
    """Skips where torch.compile does not work."""
    try:
        check_compiler(CPU)
    except NoCompilerError as error:
        pytest.skip(str(error))


def run_command(command, graphs):
    """Run a command line that may compile so many graphs, and none of them again for other guards."""
    torch._dynamo.reset()
    check_compiler(CPU)
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert program.main([*map(str, command)]) == 0
    assert counters["stats"]["unique_graphs"] - before == graphs


def leave_after_step(step, whole, left):
    """What a run that was killed after a step had left, of one that saved at every step."""
    left.mkdir()
    shutil.copy(whole / f"checkpoint-{step:08}.pth", left)


SAVE = ["--save_every_steps", "1", "--keep_checkpoints", "9"]


@pytest.fixture(scope="module")
def label_maps(photos, tmp_path_factory):
    """A map for each training image, of one class at each of 3 x 3 places."""
    root = tmp_path_factory.mktemp("maps")
    for image in (photos / "train").rglob("*.png"):
        path = label_map_path(root, image.relative_to(photos / "train"))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([torch.zeros(1, 3, 3), torch.ones(1, 3, 3)]).half(), path)
    return root


@pytest.mark.long
@pytest.mark.compile
def test_one_process_resumes_exactly(photos, label_maps, tmp_path, compiler):
    """In mixed precision, with token labels: one graph for all steps of a start."""
    command = [*BIFORMER, *COMMAND, "--data_path", photos, "--token_label", label_maps, "--amp", "bf16", *SAVE]
    run_command([*command, "--output_dir", tmp_path / "whole"], graphs=1)
    leave_after_step(2, tmp_path / "whole", tmp_path / "left")
    run_command([*command, "--output_dir", tmp_path / "left", "--auto_resume"], graphs=1)
    assert differences(tmp_path / "left", tmp_path / "whole") == []


def launch(command):
    """Run a command line on two processes; returns what they printed, and what made the compiler start again."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, f"--master_port={free_port()}", "main.py", *map(str, command)], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_LOGS": "recompiles,graph_breaks"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.compile
@pytest.mark.distributed
def test_two_processes_resume_exactly(tmp_path, compiler):
    """With a teacher, which is not compiled."""
    data, teacher = write_photos(tmp_path / "photos", train=26, val=7), tmp_path / "teacher.pth"
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), teacher)
    command = [*BIFORMER, *COMMAND, "--data_path", data, "--distillation_type", "soft", "--teacher_model", "test_vit",
               "--teacher_path", teacher, *SAVE]
    whole, left = tmp_path / "whole", tmp_path / "left"
    text = launch([*command, "--output_dir", whole])
    assert "[__recompiles]" not in text and "[__graph_breaks]" not in text
    leave_after_step(2, whole, left)
    assert "epoch 0, step 2 of 3" in launch([*command, "--output_dir", left, "--auto_resume"])
    assert differences(left, whole) == []


@pytest.mark.long
@pytest.mark.compile
def test_deformable_attention_is_one_graph(photos, tmp_path, compiler):
    run_command([*DEBIFORMER, *COMMAND, "--data_path", photos, "--output_dir", tmp_path], graphs=1)


@pytest.mark.long
@pytest.mark.compile
def test_a_network_trains_as_without_the_compiler(photos, tmp_path, compiler):
    """Nearly; checkpoints are those of the model itself."""
    command = ["--model", "test_vit", "--model_kwargs", "depth=1", *COMMAND[:-1], "--drop_path", "0", "--data_path",
               str(photos), "--epochs", "1", "--warmup_epochs", "0", "--lr", "1e-4", "--min_lr", "0"]
    assert program.main([*command, "--output_dir", str(tmp_path / "eager")]) == 0
    run_command([*command, "--output_dir", tmp_path / "compiled", "--compile"], graphs=1)
    eager, compiled = (
        torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in ("eager", "compiled")
    )
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)
    records = [json.loads((tmp_path / name / "log.txt").read_text()) for name in ("eager", "compiled")]
    assert records[1]["train_loss"] == pytest.approx(records[0]["train_loss"], rel=1e-3)


@pytest.mark.long
@pytest.mark.compile
def test_evaluation_with_a_last_batch_of_another_size(photos, tmp_path, compiler, capfd):
    """Seven images in batches of four: the results are the network's own, from a graph for each size."""
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("biformer_nano", num_classes=3, depths=(1, 0, 0, 1)).state_dict(), weights)
    command = [*BIFORMER, "--input_size", "32", "--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--eval",
               "--resume", str(weights), "--data_path", str(photos)]
    assert program.main(command) == 0
    eager = capfd.readouterr().out
    torch._dynamo.reset()
    assert program.main([*command, "--compile"]) == 0
    *said, compiling, result = capfd.readouterr().out.splitlines()
    assert compiling.startswith("compiling the network: ")
    assert [*said, result] == eager.splitlines() and "on 7 val images" in result


# --- what is refused --------------------------------------------------------------------------------------------------


ADVICE = ("; on a CPU it needs a C++ compiler and Python's headers, on a GPU Triton, a C compiler and Python's "
          "headers: install them, or leave out --compile\n")


def test_a_python_that_torch_does_not_compile(photos, tmp_path, monkeypatch, capfd):
    """Before anything is written."""
    def refuse(*arguments):
        raise RuntimeError("Python 3.15+ not yet supported for torch.compile")

    monkeypatch.setattr(torch, "compile", refuse)
    command = [*BIFORMER, *COMMAND, "--data_path", str(photos), "--output_dir", str(tmp_path / "out")]
    assert program.main(command) == 1
    assert capfd.readouterr().err == (
        f"error: torch.compile does not work on cpu here (Python 3.15+ not yet supported for torch.compile){ADVICE}"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.compile
def test_a_network_that_cannot_be_compiled():
    """In a line as well; any other error of torch's is left to a traceback."""
    def backend(graph, inputs):
        raise NotImplementedError("an operator of yours")

    with pytest.raises(RuntimeError) as error:
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    line = with_advice(fault_of(error.value))
    assert line.startswith("torch.compile cannot compile this network here (backend='backend' raised: NotImpl")
    assert line.endswith("an operator of yours); leave out --compile") and fault_of(RuntimeError("another")) is None


@pytest.mark.slow
@pytest.mark.compile
def test_no_compiler(photos, tmp_path):
    command = [sys.executable, "main.py", *BIFORMER, *COMMAND, "--data_path", photos, "--output_dir", tmp_path / "out"]
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "No working C++ compiler found" in line and line.endswith(ADVICE.rstrip("\n"))
    assert "Traceback" not in done.stderr
