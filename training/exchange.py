"""What the watches of several processes tell one another about runs that hang; see `training.watchdog`."""
import json
import os
import threading
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from .distributed import Distributed
from .launcher import restart_count
from .progress import Doing


@dataclass(frozen=True)
class Report:
    """What a process says of itself.

    Args:
        tick: Another one in every report.
        silent: Seconds for which its main thread has noted nothing new.
        waits: Whether that may wait for another process.
        epoch, step, doing: Where it is, and what it does: a `Doing`.
    """

    tick: int
    silent: float
    waits: bool
    epoch: int
    step: int
    doing: int

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{Doing(self.doing).words} in epoch {self.epoch} after step {self.step}"

    @property
    def order(self) -> tuple[int, ...]:
        """The process that all others wait for has the least."""
        return self.waits, self.epoch, self.step, self.doing


class Exchange:
    """Tells the other processes where this one is, and hears where they are, in a thread of its own.

    They meet in the store of the process group, on a connection for this alone. Where the process that has the store
    is stopped, requests wait for ever, whatever their timeout: nothing else may be done in this thread.

    Args:
        distributed: This process.
        interval: Seconds between two exchanges.
        ended: Set when the run has ended.

    Attributes:
        peers: The numbers of the other processes.
        host: Who has the store, for a message.
        own: What this process says.
        listens: Whether it wants to hear the others.
        heard: What they said last, by their numbers, while it listens.
        rounds: Exchanges so far.
        declares: Whether this process says that the run hangs.
        declared: How many processes had said so when this one did, itself included, or when it heard it; 0 for none.
    """

    def __init__(self, distributed: Distributed, interval: float, ended: threading.Event):
        self.peers = [rank for rank in range(distributed.world_size) if rank != distributed.rank]
        # torchrun has the store, or else the main process.
        self.host = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "process 0"
        self.rank, self.interval, self.ended = distributed.rank, interval, ended
        self.own: Report | None = None
        self.heard: dict[int, Report] = {}
        self.listens = self.declares = False
        self.rounds = self.declared = 0

    def run(self):
        """Exchange until the run ends; where the store is gone, so are the others."""
        try:
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
                timeout=timedelta(seconds=30),
            )
            store = dist.PrefixStore(f"watch-{restart_count()}", store)
            while not self.ended.wait(self.interval):
                self.exchange(store)
        except RuntimeError:  # torch's, of a store
            return

    def exchange(self, store: dist.Store):
        """Say and hear once."""
        if self.own is not None:
            store.set(str(self.rank), json.dumps(asdict(self.own)))
        said = [rank for rank in self.peers if self.listens and store.check([str(rank)])]
        self.heard = {rank: Report(**json.loads(store.get(str(rank)))) for rank in said}
        if self.declares and not self.declared:
            self.declared = store.add("hangs", 1)
        elif store.check(["hangs"]):
            self.declared = self.declared or 2
        self.rounds += 1
