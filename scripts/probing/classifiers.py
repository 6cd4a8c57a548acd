"""Classifiers of frozen features: the nearest neighbours, and a linear one."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F

# L2 penalties of the linear classifier among which one is chosen, on the sum over the images.
PENALTIES = tuple(10.0**power for power in range(-2, 5))
HELD_OUT = 0.1  # of the training images, for that choice
CHUNK = 1024  # images whose similarities to all others are in memory at once


def knn_predictions(
    train: torch.Tensor, targets: torch.Tensor, test: torch.Tensor, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, torch.Tensor]:
    """The classes of (M, C) features by the k most similar of (N, C) features with (N,) classes, for each k.

    Each neighbour votes with exp(cosine similarity / temperature): Wu et al., "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination" (2018), as DINO evaluates (Caron et al., 2021).

    Returns:
        (M,) int64 by k; of a k larger than N, by all.
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(targets.max()) + 1
    most = min(max(ks), len(train))
    found = {k: [] for k in ks}
    for chunk in test.split(CHUNK):
        similarities, nearest = (chunk @ train.T).topk(most, dim=1)
        weights = (similarities / temperature).exp()
        votes = F.one_hot(targets[nearest], classes) * weights[:, :, None]
        for k in ks:
            found[k].append(votes[:, :k].sum(dim=1).argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in found.items()}


class LinearProbe:
    """Multinomial logistic regression on standardised features, by L-BFGS, with an L2 penalty on the weights.

    Args:
        features: (N, C) float32, of the training images.
        targets: (N,) int64.
        num_classes: Of the data set.
    """

    def __init__(self, features: torch.Tensor, targets: torch.Tensor, num_classes: int):
        self.mean, self.std = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
        self.inputs, self.targets, self.num_classes = self._standardised(features), targets, num_classes

    def _standardised(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.std

    def choose_penalty(self, seed: int) -> float:
        """The penalty of the lowest cross-entropy on a tenth of the training images, which are not fitted to."""
        order = torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(seed))
        held_out, rest = order.tensor_split([max(1, round(HELD_OUT * len(order)))])
        losses, weights = {}, None
        for penalty in sorted(PENALTIES, reverse=True):
            weights = fit(self.inputs[rest], self.targets[rest], self.num_classes, penalty, start=weights)
            losses[penalty] = F.cross_entropy(_logits(weights, self.inputs[held_out]), self.targets[held_out]).item()
        return min(losses, key=losses.get)

    def fit(self, penalty: float):
        self.weights = fit(self.inputs, self.targets, self.num_classes, penalty)

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """(M,) int64 classes of (M, C) features."""
        return predict(self.weights, self._standardised(features))


def fit(
    inputs: torch.Tensor, targets: torch.Tensor, num_classes: int, penalty: float, start: torch.Tensor | None = None
) -> torch.Tensor:
    """(classes, C + 1) weights and biases that minimise the sum of cross-entropies + penalty / 2 * |weights|^2."""
    weights = inputs.new_zeros(num_classes, inputs.shape[1] + 1) if start is None else start.clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(weights, inputs), targets, reduction="sum")
        loss = (loss + penalty / 2 * weights[:, :-1].square().sum()) / len(targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _logits(weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return inputs @ weights[:, :-1].T + weights[:, -1]


def predict(weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return _logits(weights, inputs).argmax(dim=1)
