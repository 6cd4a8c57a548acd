import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from tasks.classification.losses import DistillationLoss, TokenLabelLoss, create_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_losses_are_timms(smoothing):
    """To rounding in float64, the gradient too; what mixup has smoothed is not smoothed again."""
    targets = torch.tensor([0, 1, 2, 3])
    soft = F.one_hot(targets, 5).double() * 0.7 + 0.06
    for ours, timms, labels in (
        (create_loss(smoothing), LabelSmoothingCrossEntropy(smoothing), targets),
        (create_loss(smoothing, soft_targets=True), SoftTargetCrossEntropy(), soft),
    ):
        logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        losses = [loss(logits, labels) for loss in (ours, timms)]
        torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses), rtol=1e-12, atol=1e-15)
        assert type(ours) is nn.CrossEntropyLoss


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


def test_a_student_that_agrees_is_at_no_distance():
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
    loss = DistillationLoss(nn.CrossEntropyLoss(), Spy(), "hard", mean=mean, std=std, teacher_mean=teacher_mean,
                            teacher_std=teacher_std)
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
