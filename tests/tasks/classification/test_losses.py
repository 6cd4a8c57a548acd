"""tasks/classification/losses.py: each loss against its formula."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tasks.classification.losses import (
    ClassWeightedCrossEntropy,
    Criterion,
    DistillationLoss,
    Renormalize,
    TokenLabelLoss,
    balanced_weights,
)


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(kind):
    teacher = Teacher()
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha=0.3, temperature=2.0)
    images, targets = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    logits = torch.randn(4, 5, requires_grad=True)
    taught = teacher(images)
    if kind == "hard":
        distance = F.cross_entropy(logits, taught.argmax(1))
    else:
        p, q = (taught / 2).softmax(1), (logits / 2).log_softmax(1)
        distance = 4 * (p * (p.log() - q)).sum(1).mean()
    expected = 0.7 * F.cross_entropy(logits, targets) + 0.3 * distance
    torch.testing.assert_close(loss(logits, targets, images), expected)
    loss(logits, targets, images).backward()
    assert logits.grad is not None and all(p.grad is None for p in teacher.parameters())
    assert not teacher.training


def test_a_student_that_agrees_has_no_loss():
    teacher = Teacher()
    images = torch.randn(4, 3, 2, 2)
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", alpha=1.0)
    assert loss(teacher(images), torch.zeros(4, dtype=torch.long), images).abs() < 1e-6


def test_the_teacher_sees_images_normalised_its_own_way():
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(len(images), 5)

    raw = torch.rand(2, 3, 4, 4)
    mean, std, teacher_mean, teacher_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (0.5, 0.5, 0.5), (0.5, 0.25, 0.125)
    images = Renormalize(mean, std, teacher_mean, teacher_std)
    loss = DistillationLoss(nn.CrossEntropyLoss(), Spy(), "hard", images=images)
    views = [torch.tensor(x).view(1, 3, 1, 1) for x in (mean, std, teacher_mean, teacher_std)]
    loss(torch.randn(2, 5), torch.tensor([0, 1]), (raw - views[0]) / views[1])
    torch.testing.assert_close(seen[0], (raw - views[2]) / views[3])


def test_unknown_kind():
    with pytest.raises(ValueError, match="'soft' or 'hard'"):
        DistillationLoss(nn.CrossEntropyLoss(), Teacher(), "medium")


def test_token_labels():
    """By hand, in float64."""
    logits, tokens = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    of_image, of_tokens = (torch.rand_like(x).softmax(dim=-1) for x in (logits, tokens))
    expected = 0.0
    for b in range(3):
        expected -= (of_image[b] * (logits[b].exp() / logits[b].exp().sum()).log()).sum() / 3
        for y in range(2):
            for x in range(4):
                token = tokens[b, y, x].exp() / tokens[b, y, x].exp().sum()
                expected -= 0.3 * (of_tokens[b, y, x] * token.log()).sum() / (3 * 8)
    found = TokenLabelLoss(0.3)((logits, tokens), (of_image, of_tokens))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_criterion_mixes_and_compares_in_float32():
    """What the network returns, a tensor or a tuple of them, is compared in float32; a teacher gets mixed images."""
    images, targets, seen = torch.ones(2, 3, 4, 4), torch.tensor([0, 1]), []

    def network(images):
        seen.append(images)
        return torch.zeros(2, 5, dtype=torch.bfloat16)

    criterion = Criterion(lambda *given: given, lambda images, targets: (2 * images, 3 * targets), sees_images=True)
    logits, labels, shown = criterion(network, images, targets)
    assert logits.dtype == torch.float32 and labels.tolist() == [0, 3]
    assert torch.equal(shown, 2 * images) and seen[0] is shown

    pair = Criterion(lambda *given: given)(lambda images: (images.half(), images.half()), images, targets)
    assert [x.dtype for x in pair[0]] == [torch.float32] * 2 and pair[1] is targets and len(pair) == 2


# --- class weights ----------------------------------------------------------------------------------------------------


def test_balanced_weights_are_inverse_to_the_numbers_of_images():
    """8 images of 3 classes: 8 / (3 * number); a class of which there is none has no weight. scikit-learn's."""
    counts = [1, 3, 0, 4]
    weights = balanced_weights(counts)
    assert weights.tolist() == pytest.approx([8 / 3, 8 / 9, 0, 2 / 3])
    assert sum(n * w for n, w in zip(counts, weights.tolist(), strict=True)) / 8 == pytest.approx(1)


@pytest.mark.parametrize("targets,smoothing,of_classes", [
    # What the classes' -log p weigh in the loss: by hand, for the weights 3, 1, 2 of two images.
    (torch.tensor([0, 1]), 0.0, [[3, 0, 0], [0, 1, 0]]),
    (torch.tensor([0, 1]), 0.3, [[3 * 0.8, 1 * 0.1, 2 * 0.1], [3 * 0.1, 1 * 0.8, 2 * 0.1]]),
    # Mixed targets are smoothed already.
    (torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5]]), 0.0, [[1.8, 0.4, 0], [0, 0.5, 1]]),
])
def test_class_weights_by_hand(targets, smoothing, of_classes):
    """The mean over the images, whatever they weigh: accumulated batches are one large batch."""
    loss = ClassWeightedCrossEntropy(torch.tensor([3.0, 1.0, 2.0]), smoothing)
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.5, 0.0]])
    expected = -(torch.tensor(of_classes) * logits.log_softmax(1)).sum() / 2
    torch.testing.assert_close(loss(logits, targets), expected)
    halves = [loss(logits[i : i + 1], targets[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(halves) / 2, expected)
    plain = ClassWeightedCrossEntropy(torch.ones(3), smoothing)
    torch.testing.assert_close(plain(logits, targets), F.cross_entropy(logits, targets, label_smoothing=smoothing))
