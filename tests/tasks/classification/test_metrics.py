import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tasks.classification.metrics import Accuracy, RecordedAccuracy
from training.distributed import Distributed
from training.precision import Precision
from utils import UserError

ALONE = Distributed(torch.device("cpu"))


def batches(count, size=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 2, 2, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


def small_model(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


@torch.inference_mode()
def evaluate(model, batches):
    accuracy = Accuracy(ALONE.device, Precision())
    for batch in batches:
        accuracy.update(model, batch)
    return accuracy.compute(ALONE)


def test_every_image_counts_once():
    model, data = small_model(classes=8), [*batches(2, classes=8), *batches(1, size=3, classes=8, seed=1)]
    result = evaluate(model, data)
    logits = torch.cat([model(images) for images, _ in data])
    targets = torch.cat([targets for _, targets in data])
    assert result["images"] == 11
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, targets).item())
    assert result["acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item())
    top5 = (logits.topk(5).indices == targets[:, None]).any(1)
    assert result["acc5"] == pytest.approx(100 * top5.float().mean().item())


def test_masked_images_are_left_out():
    model, data = small_model(), batches(2)
    images, targets = data[1]
    masked = [data[0], (torch.cat([images, images]), torch.cat([targets, torch.full_like(targets, -1)]))]
    assert evaluate(model, masked) == pytest.approx(evaluate(model, data))


def test_fewer_than_five_classes():
    assert evaluate(small_model(), batches(2))["acc5"] == 100


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="no image"):
        evaluate(small_model(), [])


def in_threads(count, work):
    """What `work(process)` returns in so many threads that stand for processes, of which each sums what all give."""
    barrier, given = threading.Barrier(count, timeout=20), [None] * count

    def exchange(rank, reduce, value):
        given[rank] = value
        barrier.wait()
        result = reduce(given)
        barrier.wait()
        return result

    def run(rank):
        process = SimpleNamespace(
            rank=rank, world_size=count, sum=partial(exchange, rank, sum), max=partial(exchange, rank, max)
        )
        with torch.inference_mode():
            return work(process)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


@pytest.mark.parametrize("images", [1, 5])
def test_what_processes_recorded_comes_together_in_order(images):
    """Of three processes, of which two may have no image; each of them learns everything."""
    model, data = small_model(classes=8), batches(1, size=images, classes=8)[0]

    def evaluate_own(process):
        recorded = RecordedAccuracy(ALONE.device, Precision())
        own = [part[process.rank::3] for part in data]
        if len(own[0]):
            recorded.update(model, own)
        return recorded, recorded.compute(process)

    top = model(data[0]).softmax(1).topk(5)
    for recorded, results in in_threads(3, evaluate_own):
        assert results == pytest.approx(evaluate(model, [data])) and recorded.num_classes == 8
        assert torch.equal(recorded.targets, data[1]) and torch.equal(recorded.classes, top.indices)
        torch.testing.assert_close(recorded.probabilities, top.values.double())
