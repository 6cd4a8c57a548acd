"""When a run is saved, and when it leaves."""
import re
import time

import pytest
import torch
from torch import nn

from storage.weights import read_checkpoint
from training import checkpoints
from training.advice import with_advice
from training.checkpointer import Checkpointer, Stopped
from training.checkpoints import CheckpointStore
from training.distributed import Distributed
from training.meter import Meter
from training.options import CheckpointOptions
from training.progress import Progress
from training.restarts import NoProgressError
from training.run import Clock, Run
from training.signals import SignalHandler
from training.waits import GaveUpWaiting


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path)


class Together:
    """A process of two, which notes when they agree."""

    is_main = True

    def __init__(self, notes):
        self.notes, self.progress = notes, Progress()

    def max(self, value):
        self.notes.append("agreed")
        return value


def create_checkpointer(store, distributed, signals=None, clock=None, **options):
    model = nn.Linear(1, 1)
    optimizer, clock = torch.optim.SGD(model.parameters()), clock or Clock(epoch_length=3, total=6)
    run = Run(model, None, optimizer, None, clock, global_batch=4)
    run.state_dict = lambda: dict(step=run.clock.step)
    return Checkpointer(run, store, distributed, signals or SignalHandler(), {}, CheckpointOptions(**options))


def test_nobody_leaves_before_the_main_process_has_saved(tmp_path):
    """A launcher that sees a process end may end the others in the middle of the save."""
    notes = []
    store = CheckpointStore(tmp_path)
    store.save = lambda step, state: notes.append("saved")
    store.finish = lambda: notes.append("written")
    signals = SignalHandler()
    signals.signal = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM: stopped in epoch 0 after step 0 of 3, saved as "):
        create_checkpointer(store, Together(notes), signals).between_epochs()
    assert notes == ["agreed", "saved", "written", "agreed"]


def leave(store, epoch, step, steps_taken=0):
    """Start a run there, take so many steps, and ask it to leave; returns what it raises."""
    signals, clock = SignalHandler(), Clock(3, 6, epoch, step)
    checkpointer = create_checkpointer(store, Distributed(torch.device("cpu")), signals, clock)
    for _ in range(steps_taken):
        clock.advance()
    signals.signal = "SIGUSR1"
    with pytest.raises((Stopped, NoProgressError)) as raised:
        checkpointer.between_epochs()
    return raised.value


def test_a_run_that_never_takes_a_step_does_not_ask_to_be_started_again_for_ever(store):
    assert [type(leave(store, 1, 1)) for _ in range(4)] == [Stopped, Stopped, NoProgressError, NoProgressError]
    error = leave(store, 1, 1)
    assert re.match(r"SIGUSR1: stopped in epoch 1 after step 1 of 3, saved as .*; 5 starts in a row", str(error))
    assert "longer" in with_advice(error)


def test_a_run_that_takes_steps_may_be_started_for_ever(store):
    for position in ((0, 0), (0, 0), (0, 1), (0, 1), (1, 0)):
        assert isinstance(leave(store, *position), Stopped)
    assert isinstance(leave(store, 1, 0, steps_taken=2), Stopped)
    (store.folder / ".starts.json").write_text("{")  # of a disk that was full
    assert [type(leave(store, 1, 2)) for _ in range(3)] == [Stopped, Stopped, NoProgressError]


def test_the_main_process_counts_starts_for_all(store):
    peer = Together([])
    peer.is_main, peer.max = False, lambda value: max(value, 3)
    signals = SignalHandler()
    signals.signal = "SIGUSR1"
    with pytest.raises(NoProgressError):
        create_checkpointer(store, peer, signals).between_epochs()
    assert not list(store.folder.iterdir())


def test_the_first_checkpoint_is_there_before_its_epoch_is_logged(store, monkeypatch):
    """A run that logged an epoch, and was killed while it wrote, would be taken for one that lost its checkpoints."""
    write = checkpoints.save_checkpoint
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *args: (time.sleep(0.5), write(*args)))
    alone, clock = Distributed(torch.device("cpu")), Clock(epoch_length=3, total=6, epoch=0, step=3, steps_taken=3)
    create_checkpointer(store, alone, clock=clock, save_every=1).after_epoch(Meter(alone))
    assert store.steps() == [3]
    clock.epoch, clock.steps_taken = 1, 6
    create_checkpointer(store, alone, clock=clock, save_every=1).after_epoch(Meter(alone))
    assert store.steps() == [3]  # later ones are written behind
    store.finish()


def test_saving_moves_no_clock(store):
    """Only the trainer does: the clock is where it was after every call, also where the run leaves."""
    alone, signals = Distributed(torch.device("cpu")), SignalHandler()
    clock = Clock(epoch_length=3, total=6, epoch=1, step=1, steps_taken=4)
    checkpointer = create_checkpointer(store, alone, signals, clock, save_every_steps=1)
    before = Clock(**vars(clock))
    checkpointer.after_step(Meter(alone))
    store.finish()
    assert store.steps() == [4] and clock == before
    checkpointer.after_epoch(Meter(alone))
    checkpointer.between_epochs()
    checkpointer.save_best()
    store.finish()
    assert clock == before and read_checkpoint(str(store.best))["step"] == 1
    signals.signal = "SIGUSR1"
    for leave in (lambda: checkpointer.after_step(Meter(alone)), checkpointer.between_epochs):
        with pytest.raises(Stopped):
            leave()
        assert clock == before


@pytest.mark.parametrize("epoch,saved", [(1, [2]), (2, [])])
def test_patience_is_over_by_the_main_process_alone(store, epoch, saved):
    """The others record no best where they do not save it, and their last digits may differ."""
    main, peer = Together([]), Together([])
    peer.is_main = False
    clock = Clock(epoch_length=1, total=3, epoch=epoch, step=1, steps_taken=epoch + 1)
    checkpointers = [create_checkpointer(store, process, clock=clock, patience=1) for process in (main, peer)]
    checkpointers[0].run.best_epoch = epoch  # a better one, which the other process did not find
    assert [each.ends_early() for each in checkpointers] == [False, False]
    checkpointers[0].run.best_epoch = epoch - 1
    # of the last epoch, there is nothing to end
    assert checkpointers[0].ends_early() == bool(saved)
    store.finish()
    assert store.steps() == saved


def test_steps_are_counted_in_all_epochs(store):
    """A checkpoint is named after the steps taken, which a change of the batch size does not take back."""
    clock = Clock(epoch_length=1, total=4, epoch=3, step=0, steps_taken=7)
    signals = SignalHandler()
    signals.signal = "SIGTERM"
    with pytest.raises(Stopped, match=r"epoch 3 after step 0 of 1, saved as .*checkpoint-00000007"):
        create_checkpointer(store, Distributed(torch.device("cpu")), signals, clock).between_epochs()


def test_a_run_that_is_ended_at_once_says_what_it_leaves(store):
    signals = SignalHandler()
    checkpointer = create_checkpointer(store, Distributed(torch.device("cpu")), signals)
    assert signals.kept() == "no checkpoint was written yet"
    checkpointer._write()
    store.finish()
    assert signals.kept() == f"the last checkpoint is {store.path(0)}"


def test_a_run_that_gave_up_waiting_for_data_saves_its_last_step(store):
    signals, clock = SignalHandler(), Clock(epoch_length=3, total=6, epoch=1, step=1, steps_taken=4)
    signals.signal = "SIGTERM"
    alone = Distributed(torch.device("cpu"))
    checkpointer, meter = create_checkpointer(store, alone, clock=clock), Meter(alone)
    meter.add(dict(loss=torch.tensor(3.0)), 4, 0.0, 3, 0.1)
    checkpointer.after_step(meter)
    checkpointer.signals = signals
    stopped = pytest.raises(Stopped, match=r"SIGTERM: stopped in epoch 1 after step 1 of 3, saved as .*0004.pth")
    with stopped, checkpointer.leaving_without_data():
        raise GaveUpWaiting
    assert store.steps() == [4] and checkpointer.run.meter["losses"] == [3.0]


def test_several_processes_that_gave_up_waiting_for_data_agree_on_nothing(store):
    """The others wait for this one: it saves nothing, and says what there is."""
    signals, notes = SignalHandler(), []
    signals.signal = "SIGTERM"
    peer = Together(notes)
    peer.is_distributed = True
    checkpointer = create_checkpointer(store, peer, signals)
    stopped = pytest.raises(Stopped, match="after step 0 of 3, without data, no checkpoint was written yet")
    with stopped, checkpointer.leaving_without_data():
        raise GaveUpWaiting
    assert notes == [] and store.steps() == []
