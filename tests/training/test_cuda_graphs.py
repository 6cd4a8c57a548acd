"""training.cuda_graphs without a GPU: what is refused, and when the network is captured. tests/test_cuda.py trains."""
import copy
import pickle

import pytest
import torch

from main import main
from training import cuda_graphs
from training.cuda_graphs import CudaGraphError, GraphedTraining, check_cuda_graphs
from training.distributed import Distributed
from training.precision import Precision

COMMAND = ["--config", "configs/train/quickstart.yaml", "--cuda_graph"]


def test_a_gpu_and_one_process_are_asked_for():
    with pytest.raises(CudaGraphError, match="the device is cpu"):
        check_cuda_graphs(Distributed(torch.device("cpu")))
    with pytest.raises(CudaGraphError, match="there are 2"):
        check_cuda_graphs(Distributed(torch.device("cuda"), 0, 2))
    check_cuda_graphs(Distributed(torch.device("cuda")))


@pytest.mark.parametrize("more,message", [
    (["--device", "cpu"], "CUDA graphs need a GPU, the device is cpu; leave out --cuda_graph"),
    (["--update_freq", "2"], "--update_freq must be 1, got 2"),
    (["--grad_checkpointing"], "--cuda_graph cannot capture --grad_checkpointing"),
])
def test_refusals_are_one_line_and_leave_nothing(more, message, tmp_path, capsys):
    assert main([*COMMAND, "--output_dir", str(tmp_path / "run"), *more]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluation_replays_no_graphs_and_needs_no_gpu(tmp_path, capsys):
    assert main([*COMMAND, "--eval", "--resume", str(tmp_path / "none.pth"), "--device", "cpu"]) == 1
    assert "none.pth" in capsys.readouterr().err


@pytest.fixture
def graphed(monkeypatch):
    """A network, and what was captured of it; nothing is captured without a GPU, and a replay adds 100."""
    captured = []

    def capture(network, inputs, precision):
        captured.append([tuple(x.shape) for x in inputs])
        eager = network.forward
        network.forward = lambda x: eager(x) + 100

    monkeypatch.setattr(cuda_graphs, "_capture", capture)
    network = torch.nn.Linear(3, 1)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    return GraphedTraining(network, Precision()), captured


def test_the_first_training_pass_is_captured_and_evaluation_is_not(graphed):
    graphed, captured = graphed
    x = torch.ones(2, 3)
    assert graphed.eval()(x).tolist() == [[0], [0]] and captured == []
    assert graphed.train()(x).tolist() == [[100], [100]] and captured == [[(2, 3)]]
    assert graphed(x).tolist() == [[100], [100]] and len(captured) == 1
    assert graphed.eval()(torch.ones(5, 3)).tolist() == [[0]] * 5, "of any number of images"
    assert graphed.network.training is False and graphed.train().network.training is True


def test_the_network_itself_stays_as_it_is(graphed):
    graphed, _ = graphed
    x = torch.ones(2, 3)
    graphed.train()(x)
    for network in (graphed.network, copy.deepcopy(graphed.network), pickle.loads(pickle.dumps(graphed.network))):
        assert network(x).tolist() == [[0], [0]]
    assert len(list(graphed.parameters())) == 2


@pytest.mark.parametrize("other", [torch.ones(1, 3), torch.ones(2, 3, dtype=torch.float64)])
def test_a_batch_of_another_shape_or_type_is_an_error_and_is_not_broadcast(graphed, other):
    graphed, _ = graphed
    graphed.train()(torch.ones(2, 3))
    with pytest.raises(CudaGraphError, match=r"captured for \[\(\(2, 3\), torch.float32\)\], got"):
        graphed(other)
