"""tasks/networks.py: the backbone that is frozen, and the classifier that is kept or re-initialised."""
import copy

import pytest
import timm
import torch

from tasks.networks import freeze_backbone, hold_frozen, load_checkpoint, published_classes, renew_classifier
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


# --- weights of other classes -----------------------------------------------------------------------------------------

# With one classifier, with two, and with one for each token.
HEADS = {"biformer_nano": {}, "deit_tiny_distilled_patch16_224": {}, "debiformer_tiny": dict(token_head=True)}


def heads_of(model):
    """The weights of all classifiers of a model, by name."""
    heads = {*CLASSIFIERS.get(model.default_cfg["architecture"], {"head.fc"}), "token_head"}
    return {name: value.clone() for name, value in model.state_dict().items() if name.rpartition(".")[0] in heads}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("classes, reason", [
    (["cat", "dog"], None),
    (["cat", "elk"], "was trained on other classes: 'elk', where the data has 'dog'"),
    (["dog", "cat"], "was trained on the same classes in another order: number 0 was 'dog', and is 'cat' here"),
    (["cat"], "was trained on 1 classes, the data has 2, with 'dog' added"),  # of a network for more
    (None, None),
])
def test_a_classifier_of_other_classes_is_re_initialised(name, classes, reason):
    """As many classes of other names kept the old classifier without a word."""
    trained, model = (timm.create_model(name, num_classes=2, **HEADS[name]) for _ in range(2))
    before, theirs = heads_of(model), heads_of(trained)
    checkpoint = dict(model=trained.state_dict()) | (dict(classes=classes) if classes else {})
    notes = load_checkpoint(model, checkpoint, "x.pth", new_classifier=True, trained_on=["cat", "dog"])
    assert notes == ([f"x.pth {reason}: the classifier is re-initialised"] if reason else [])
    after, expected = heads_of(model), before if reason else theirs
    assert after.keys() == expected.keys() and all(torch.equal(after[key], expected[key]) for key in expected)
    rest = {key: value for key, value in trained.state_dict().items() if key not in expected}
    assert rest and all(torch.equal(model.state_dict()[key], value) for key, value in rest.items())


@pytest.mark.parametrize("classes, told", [
    (None, None),
    (published_classes("biformer_nano"), None),
    ([*"abcdefghij"], "was trained on other classes: 'n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03028079' "
                      "and 5 more, where the data has 'a', 'b', 'c', 'd', 'e' and 5 more"),
    (["a"], "has 10 classes, not 1"),
])
def test_published_weights_of_other_classes_get_a_new_classifier(classes, told):
    """Those of ten classes, on ten others, kept their classifier without a word."""
    model = timm.create_model("biformer_nano", pretrained=True, num_classes=len(classes or range(10)))
    before = heads_of(model)
    backbone = copy.deepcopy(model.stages.state_dict())
    notes = renew_classifier(model, "biformer_nano", classes)
    assert notes == ([f"the published biformer_nano {told}: the classifier is re-initialised"] if told else [])
    is_new = bool(told) and len(classes) == 10  # timm's own, where the number differs
    assert all(value.equal(heads_of(model)[key]) != is_new for key, value in before.items())
    assert all(value.equal(model.stages.state_dict()[key]) for key, value in backbone.items())
