"""What training minimises: cross-entropy, token labels, and distillation from a teacher."""
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import nn


def create_loss(smoothing: float = 0.0, soft_targets: bool = False) -> nn.Module:
    """Cross-entropy on (B, classes) logits, of class indices or, where mixup made them so, of (B, classes) targets."""
    # Mixup has smoothed its targets already.
    return nn.CrossEntropyLoss(label_smoothing=0.0 if soft_targets else smoothing)


class TokenLabelLoss(nn.Module):
    """Cross-entropy of the image, plus `weight` times the mean one of its tokens.

    Of Jiang et al., https://arxiv.org/abs/2104.10858, where the weight is 0.5.
    """

    def __init__(self, weight: float = 0.5):
        super().__init__()
        self.loss = SoftTargetCrossEntropy()
        self.weight = weight

    def forward(
        self, logits: tuple[torch.Tensor, torch.Tensor], targets: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Logits and targets of images, (B, classes), and of their tokens, (B, h, w, classes) -> scalar."""
        of_image, of_tokens = (self.loss(x, target) for x, target in zip(logits, targets, strict=True))
        return of_image + self.weight * of_tokens


class DistillationLoss(nn.Module):
    """(1 - alpha) * the loss on the labels + alpha * the distance to a teacher's prediction.

    "soft": KL divergence at a temperature (Hinton et al., https://arxiv.org/abs/1503.02531), times temperature ** 2.
    "hard": cross-entropy to the teacher's class (DeiT, Touvron et al., https://arxiv.org/abs/2012.12877).

    Args:
        loss: The loss on the labels.
        teacher: Classifier with the student's classes; put into eval mode, never trained.
        kind: "soft" or "hard".
        alpha: Weight of the teacher, 0 to 1.
        temperature: Divides the logits of both, for "soft".
        mean, std: What the student's images were normalised with.
        teacher_mean, teacher_std: What the teacher's are to be normalised with.
    """

    def __init__(
        self,
        loss: nn.Module,
        teacher: nn.Module,
        kind: str,
        alpha: float = 0.5,
        temperature: float = 1.0,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        teacher_mean: tuple[float, ...] = (0.0,),
        teacher_std: tuple[float, ...] = (1.0,),
    ):
        super().__init__()
        if kind not in ("soft", "hard"):
            raise ValueError(f"kind must be 'soft' or 'hard', got {kind!r}")
        self.loss = loss
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature
        mean, std, teacher_mean, teacher_std = (
            torch.tensor(x).view(1, -1, 1, 1) for x in (mean, std, teacher_mean, teacher_std)
        )
        self.register_buffer("scale", std / teacher_std)
        self.register_buffer("shift", (mean - teacher_mean) / teacher_std)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """(B, classes) logits, targets as the label loss takes them, (B, 3, H, W) images -> scalar."""
        with torch.no_grad():
            teacher_logits = self.teacher(images * self.scale + self.shift)
        if self.kind == "hard":
            distance = F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        else:
            log_student = F.log_softmax(logits.float() / self.temperature, dim=1)
            log_teacher = F.log_softmax(teacher_logits.float() / self.temperature, dim=1)
            distance = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
            distance = distance * self.temperature**2
        return (1 - self.alpha) * self.loss(logits, targets) + self.alpha * distance
