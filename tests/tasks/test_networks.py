"""tasks/networks.py: the backbone that is frozen."""
import pytest
import timm
import torch

from tasks.networks import freeze_backbone, hold_frozen
from utils import UsageError

# With one linear layer, two of them, and two with norms of their own.
CLASSIFIERS = {
    "biformer_nano": {"head.fc"}, "resnet10t": {"fc"}, "deit_tiny_distilled_patch16_224": {"head", "head_dist"},
    "tf_efficientnet_b0": {"classifier"}, "convnext_atto": {"head.fc"},
    "levit_128s": {"head.bn", "head.linear", "head_dist.bn", "head_dist.linear"},
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifier_of_any_model_is_what_is_left_to_train(name):
    model = timm.create_model(name, num_classes=3)
    freeze_backbone(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0] for name in trained} == CLASSIFIERS[name]
    model.train()
    hold_frozen(model)
    modules = dict(model.named_modules())
    above = {".".join(path.split(".")[:i]) for path in CLASSIFIERS[name] for i in range(len(path.split(".")))}
    assert {path for path, module in modules.items() if module.training} == above | CLASSIFIERS[name]
    model.eval()
    hold_frozen(model)
    assert not any(module.training for module in model.modules())


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(UsageError, match=r"^ResNet has no classifier to train$"):
        freeze_backbone(timm.create_model("resnet10t", num_classes=0))


def test_frozen_statistics_do_not_follow_the_batch():
    model = timm.create_model("resnet10t", num_classes=3)
    freeze_backbone(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    hold_frozen(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}
