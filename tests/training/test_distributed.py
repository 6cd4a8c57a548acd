import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from helpers.ports import free_port
from training.advice import with_advice
from training.distributed import DeviceError, Distributed, init_distributed, warm_up_ddp, wrap_ddp

CPU = torch.device("cpu")

PROGRAM = """
import sys

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [{root!r}]
from training.distributed import init_distributed, share_statistics, warm_up_ddp, wrap_ddp
{body}
# A thread of gloo's that still holds a tensor while the interpreter ends would abort the process.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def launch(processes, body):
    """Standard output of a program on so many processes."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, f"--master_port={free_port()}", "--no-python", sys.executable, "-c",
         PROGRAM.format(root=str(ROOT), body=body)],
        capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_unknown_device():
    with pytest.raises(DeviceError) as error:
        init_distributed("toaster")
    line = with_advice(error.value)
    assert line.startswith("device toaster cannot be used (") and line.endswith("; --device auto takes what is there")
    assert "\n" not in line


def test_single_process():
    distributed = Distributed(CPU)
    assert distributed.is_main and not distributed.is_distributed
    assert distributed.mean(torch.tensor([2.0])).item() == 2
    assert distributed.max(3) == 3
    model = torch.nn.Linear(1, 1)
    assert wrap_ddp(model, distributed) is model


def test_alone_is_the_only_process():
    assert Distributed(CPU, rank=2, world_size=4).alone() == Distributed(CPU)


@pytest.mark.parametrize("world_size", [1, 2])
def test_fewer_than_three_processes_need_no_warm_up(world_size):
    warm_up_ddp(None, Distributed(CPU, world_size=world_size), loss=None)


TWO = """
distributed = init_distributed("cpu")
value = torch.tensor([float(distributed.rank + 1)])
assert distributed.mean(value.clone()) == 1.5 and distributed.sum(value.clone()) == 3
assert distributed.max(distributed.rank) == 1 and distributed.is_main == (distributed.rank == 0)
model = nn.BatchNorm1d(2)
model.running_mean.fill_(distributed.rank)
share_statistics(model, None, distributed)
assert model.running_mean.tolist() == [0.5, 0.5]
print("as expected")
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share():
    assert launch(2, TWO).count("as expected") == 2


# The last layer's gradient is ready first, so that DDP rebuilds its small buckets in another order than it made them.
THREE = """
distributed = init_distributed("cpu")
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.BatchNorm1d(64))
before = {name: value.clone() for name, value in model.state_dict().items()}
network = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.02)
torch.manual_seed(distributed.rank)
images = torch.randn(8, 64)


def gradients():
    network.train()
    network.zero_grad()
    network(images).square().mean().backward()
    values = [p.grad.clone() for p in model.parameters()]
    network.zero_grad()
    model.load_state_dict(before)
    return values


if WARM_UP:
    warm_up_ddp(network, distributed, lambda: network(torch.zeros(8, 64)).square().mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
first, second = gradients(), gradients()
same = all(map(torch.equal, first, second))
print("the same" if same else "another")
"""


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("warm_up,expected", [(True, "the same"), (False, "another")])
def test_no_pass_that_counts_is_the_first_of_three_processes(warm_up, expected):
    """Warmed up, the first pass sums as all others do; weights, statistics and gradients are as they were."""
    assert launch(3, THREE.replace("WARM_UP", str(warm_up))).count(expected) == 3
