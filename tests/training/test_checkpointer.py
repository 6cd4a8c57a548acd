"""When a run is saved, and when it leaves."""
import pytest
import torch
from torch import nn

from storage.weights import read_checkpoint
from training.checkpointer import Checkpointer, Stopped
from training.checkpoints import CheckpointStore
from training.distributed import Distributed
from training.log import Meter
from training.options import CheckpointOptions
from training.run import Clock, Run
from training.signals import SignalHandler


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path)


class Together:
    """A process of two, which notes when they agree."""

    is_main = True

    def __init__(self, notes):
        self.notes = notes

    def max(self, value):
        self.notes.append("agreed")
        return value


def create_checkpointer(store, distributed, signals=None, clock=None, **options):
    run = Run(nn.Linear(1, 1), None, None, None, clock or Clock(epoch_length=3, total=6), global_batch=4)
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
