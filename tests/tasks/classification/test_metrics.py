import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tasks.classification.metrics import Accuracy
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
