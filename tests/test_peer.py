"""The runs by main.py and by timm's parts are the same but for their random numbers: steps, learning rates, groups."""
import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import main as program
import models  # noqa: F401, registers our models with timm
from helpers import ROOT
from helpers.peer import __main__ as peer
from training.run import Clock


@pytest.fixture
def run(monkeypatch, photos, tmp_path):
    """main.py's run and its settings, as the comparison asks for it."""
    asked = []
    monkeypatch.setattr(peer.subprocess, "run", lambda words, **kwargs: asked.append(words))
    args = argparse.Namespace(epochs=4, input_size=32, data_path=photos, num_workers=0, batch_size=4, num_classes=3)
    with pytest.raises(FileNotFoundError):  # of the log that nothing wrote
        peer.train(peer.OURS, "biformer_nano", 0, args, tmp_path / "run")
    return program.parse([str(word) for word in asked[0][2:]])[1]


def test_learning_rates_are_timms(run):
    network = timm.create_model("biformer_nano", num_classes=3)
    updates, epochs = 3, 4
    theirs_optimizer = create_optimizer_v2(network, opt="adamw", lr=peer.LR, weight_decay=0.05)
    theirs, _ = create_scheduler_v2(
        theirs_optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=peer.LR / 1000,
        min_lr=peer.LR / 100, step_on_epochs=False, updates_per_epoch=updates,
    )
    ours_optimizer = torch.optim.AdamW([torch.zeros(1)], lr=peer.LR)
    ours = program.create_schedule(run.schedule, Clock(updates, updates * epochs), peer.LR).build(ours_optimizer)
    for step in range(updates * epochs):
        ours.step_update(step)
        theirs.step_update(step)
        rates = [group["lr"] for group in theirs_optimizer.param_groups]
        assert [ours_optimizer.param_groups[0]["lr"]] * len(rates) == pytest.approx(rates, rel=1e-6), step


def test_optimizers_are_alike(run):
    network, asked = timm.create_model("biformer_nano", num_classes=3), run.optimizer
    ours = program.create_optimizer(
        network, asked.opt, program.scaled_lr(asked.lr, 4), asked.weight_decay, asked.momentum, asked.layer_decay,
        asked.decay_groups, eps=asked.opt_eps,
    )
    theirs = create_optimizer_v2(network, opt="adamw", lr=peer.LR, weight_decay=0.05)

    def described(optimizer):
        keys = ("weight_decay", "betas", "eps")
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        return {names[id(p)]: [group[key] for key in keys] for group in optimizer.param_groups for p in group["params"]}

    assert type(ours) is type(theirs) and described(ours) == described(theirs)
    assert [group["lr"] for group in ours.param_groups] == pytest.approx([peer.LR] * len(ours.param_groups))


@pytest.mark.slow
def test_both_programs_train(photos, tmp_path, capsys):
    words = ["--data_path", str(photos), "--output", str(tmp_path / "peer.json"), "--models", "biformer_nano"]
    words += ["--seeds", "0", "--epochs", "2", "--input_size", "32", "--batch_size", "4", "--num_workers", "0"]
    words += ["--num_classes", "3"]
    peer.main(words)
    runs = json.loads(Path(tmp_path / "peer.json").read_text())["runs"]
    assert [run["program"] for run in runs] == ["main.py", "timm"]
    assert all([epoch["epoch"] for epoch in run["epochs"]] == [0, 1] for run in runs)
    assert "| biformer_nano | timm | 1 |" in capsys.readouterr().out
    peer.main(words)
    assert "biformer_nano 0 " not in capsys.readouterr().out  # nothing is left to do


def test_the_table_of_the_documents_follows_from_the_record():
    record = json.loads((ROOT / "benchmarks/comparison/peer.json").read_text())
    text = (ROOT / "docs/comparison.md").read_text()
    assert peer.table(record["runs"]) in text and record["machine"]["date"].split()[0] in text
