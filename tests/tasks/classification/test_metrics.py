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


@torch.inference_mode()
@pytest.mark.parametrize("images", [1, 5])
def test_what_processes_recorded_comes_together_in_order(images):
    """Of three processes, of which two may have no image; each of them learns everything."""
    model, data = small_model(classes=8), batches(1, size=images, classes=8)[0]
    recorded = [RecordedAccuracy(ALONE.device, Precision()) for _ in range(3)]
    for rank, accuracy in enumerate(recorded):
        own = [part[rank::3] for part in data]
        if len(own[0]):
            accuracy.update(model, own)

    def compute(rank, others):
        """`others`: what the other processes give to each sum, in turn."""
        given = []
        process = SimpleNamespace(
            rank=rank, world_size=3, max=lambda value: 8,
            sum=lambda values: given.append(values) or sum(others[len(given) - 1], values),
        )
        recorded[rank].compute(process)
        return given

    # the totals, then how many rows each process has, then the rows, which need the number of all
    counts = [torch.tensor(float(len(range(rank, images, 3)))) for rank in range(3)]
    totals = [accuracy.totals for accuracy in recorded]
    width = 1 + 2 * 5
    for rank in range(3):
        rest = [other for other in range(3) if other != rank]
        rows = []
        for other in rest:
            table = torch.zeros(images, width, dtype=torch.float64)
            if recorded[other].rows:
                table[other::3] = torch.cat(recorded[other].rows)
            rows.append(table)
        compute(rank, [[totals[other] for other in rest], [counts[other] for other in rest], rows])
        top = model(data[0]).softmax(1).topk(5)
        assert torch.equal(recorded[rank].targets, data[1]) and torch.equal(recorded[rank].classes, top.indices)
        torch.testing.assert_close(recorded[rank].probabilities, top.values.double())
