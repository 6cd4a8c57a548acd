"""Two machines, each with its own launcher: two launchers that meet at a port of this machine."""
import json
import os
import re
import subprocess
import sys

import pytest

import main as program
from helpers import ROOT
from helpers.ports import free_port
from helpers.run_state import differences

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
SMALL = ["--model", "biformer_nano", "--input_size", "32", "--num_workers", "1", "--device", "cpu"]
TRAIN = ["--batch_size", "2", "--epochs", "2", "--warmup_epochs", "1", "--lr", "1e-2", "--log_every", "1"]
RESULT = re.compile(r"\* Acc@1 .* of the network on 7 val images")


def on_two_machines(*arguments):
    """main.py as the guide launches it on each machine; exit codes, and what they wrote, the main one's first."""
    meet = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    launchers = []
    for _ in range(2):
        launchers.append(subprocess.Popen(
            [*TORCHRUN, *meet, "--nproc_per_node=1", "main.py", *map(str, arguments)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        ))
    outputs = [launcher.communicate(timeout=300) for launcher in launchers]
    return [launcher.returncode for launcher in launchers], sorted(outputs, reverse=True)


@pytest.mark.long
def test_two_machines_are_one(photos, tmp_path, capfd):
    """They train what two processes of one machine train, and evaluate each image once.

    Of the 13 training images they share 12; of the 7 to evaluate, one gets 4 and the other 3.
    """
    arguments = [*SMALL, *TRAIN, "--data_path", photos, "--output_dir"]
    codes, outputs = on_two_machines(*arguments, tmp_path / "machines")
    assert codes == [0, 0], outputs
    assert "2 images x 2 processes" in outputs[0][0] and outputs[1][0] == ""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "main.py", *map(str, arguments), str(tmp_path / "one")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert differences(tmp_path / "machines", tmp_path / "one") == []

    checkpoint = tmp_path / "machines" / "last.pth"
    evaluation = [*SMALL, "--data_path", photos, "--dist_eval", "--eval", "--resume", checkpoint]
    codes, outputs = on_two_machines(*evaluation)
    assert codes == [0, 0], outputs
    assert program.main([str(word) for word in evaluation]) == 0
    alone = RESULT.search(capfd.readouterr().out).group()
    assert RESULT.search(outputs[0][0]).group() == alone
    last = json.loads((tmp_path / "one" / "log.txt").read_text().splitlines()[-1])
    assert f"Acc@1 {last['val_acc1']:.3f}" in alone


def test_data_that_is_nowhere(photos, tmp_path):
    """A line from each of them, and no hang."""
    codes, outputs = on_two_machines(*SMALL, *TRAIN, "--data_path", photos / "nowhere", "--output_dir", tmp_path)
    assert 0 not in codes
    assert all("does not exist" in error for _, error in outputs)
