import copy

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

from engine import NonFiniteLossError, Numerics, Trainer, evaluate
from optim_factory import create_schedule
from utils import Process, RunLog, UserError

PROCESS = Process(torch.device("cpu"))


def batches(count, size=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 2, 2, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


def small_model(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


def cross_entropy(logits, targets, images):
    return F.cross_entropy(logits, targets)


def train(model, loader, *, epoch=0, epochs=1, loss_fn=cross_entropy, lr=0.1, opt=torch.optim.SGD, **kwargs):
    optimizer = opt(model.parameters(), lr=lr)
    schedule = create_schedule(optimizer, "cosine", 100, len(loader) // kwargs.get("update_freq", 1), 0, 0.0, lr)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer = Trainer(
        model, model, loss_fn, optimizer, schedule, scaler, PROCESS, RunLog(None), epochs=epochs, **kwargs
    )
    return trainer.train_one_epoch(loader, epoch)


def test_an_epoch_is_plain_gradient_descent():
    model, loader = small_model(), batches(3)
    expected, losses = copy.deepcopy(model), []
    for images, targets in loader:
        loss = F.cross_entropy(expected(images), targets)
        expected.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in expected.parameters():
                p -= 0.1 * p.grad
    stats = train(model, loader)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert stats["loss"] == pytest.approx(sum(losses) / 3)
    assert stats["lr"] == pytest.approx(0.1) and stats["images_per_second"] > 0


def test_accumulated_batches_are_one_large_batch():
    small, large = small_model(), small_model()
    loader = batches(4, size=2)
    merged = [tuple(torch.cat(x) for x in zip(*loader[i : i + 2], strict=True)) for i in (0, 2)]
    train(small, loader, update_freq=2)
    train(large, merged)
    torch.testing.assert_close(small.state_dict(), large.state_dict())


def test_batches_that_make_no_whole_step_are_left_out():
    five, four = small_model(), small_model()
    train(five, batches(5), update_freq=2)
    train(four, batches(5)[:4], update_freq=2)
    torch.testing.assert_close(five.state_dict(), four.state_dict())


def test_gradients_are_clipped():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    train(model, batches(1), lr=1.0, clip_grad=1e-3)
    moved = torch.cat([(model.state_dict()[k] - v).flatten() for k, v in before.items()]).norm()
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_average_of_the_weights():
    model = small_model()
    ema = ModelEmaV3(model, decay=0.5)
    start = model[1].weight.detach().clone()
    train(model, batches(1), ema=ema)
    torch.testing.assert_close(ema.module[1].weight, (start + model[1].weight) / 2)


@pytest.mark.parametrize("bad,log_every", [(0, 50), (3, 50), (3, 2), (6, 2)])
def test_a_loss_that_is_not_finite_is_named_by_its_step(bad, log_every):
    calls = []

    def loss_fn(logits, targets, images):
        calls.append(None)
        return F.cross_entropy(logits, targets) * (float("nan") if len(calls) == bad + 1 else 1.0)

    with pytest.raises(NonFiniteLossError, match=rf"became nan in epoch 2 at step {2 * 7 + bad}, learning rate 0.1"):
        train(small_model(), batches(7), loss_fn=loss_fn, epoch=2, epochs=3, log_every=log_every)


def test_low_precision_is_the_models_and_not_the_losses():
    model, types = small_model(), []
    model[1].register_forward_hook(lambda module, args, out: types.append(out.dtype))

    def loss_fn(logits, targets, images):
        types.append(logits.dtype)
        return F.cross_entropy(logits, targets)

    train(model, batches(1), loss_fn=loss_fn, numerics=Numerics("cpu", torch.bfloat16))
    assert types == [torch.bfloat16, torch.float32]


def test_weights_that_are_not_finite_after_a_finite_loss():
    def loss_fn(logits, targets, images):
        logits.register_hook(lambda grad: grad * float("inf"))
        return F.cross_entropy(logits, targets)

    with pytest.raises(NonFiniteLossError, match="weights became NaN or infinite in epoch 0"):
        train(small_model(), batches(1), loss_fn=loss_fn)


def test_log_lines(capsys):
    train(small_model(), batches(5), epochs=2, log_every=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 0 [2/5]", "epoch 0 [4/5]", "epoch 0 [5/5]"]
    for part in ("loss", "lr", "images/s", "data", "eta"):
        assert part in lines[0]


def test_evaluation_counts_every_image_once():
    model, loader = small_model(classes=8), [*batches(2, classes=8), *batches(1, size=3, classes=8, seed=1)]
    result = evaluate(model, loader, PROCESS)
    logits = torch.cat([model(images) for images, _ in loader])
    targets = torch.cat([targets for _, targets in loader])
    assert result["images"] == 11
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, targets).item())
    assert result["acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item())
    top5 = (logits.topk(5).indices == targets[:, None]).any(1)
    assert result["acc5"] == pytest.approx(100 * top5.float().mean().item())


def test_evaluation_leaves_masked_images_out():
    model, loader = small_model(), batches(2)
    images, targets = loader[1]
    masked = [loader[0], (torch.cat([images, images]), torch.cat([targets, torch.full_like(targets, -1)]))]
    assert evaluate(model, masked, PROCESS) == pytest.approx(evaluate(model, loader, PROCESS))


def test_fewer_than_five_classes():
    assert evaluate(small_model(), batches(2), PROCESS)["acc5"] == 100


def test_nothing_to_evaluate():
    with pytest.raises(UserError, match="no image"):
        evaluate(small_model(), [], PROCESS)


def test_the_learning_rate_of_a_log_is_that_of_the_last_layers():
    model = small_model()
    groups = [dict(params=[model[1].bias], lr_scale=0.1), dict(params=[model[1].weight], lr_scale=1.0)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = create_schedule(optimizer, "cosine", 100, 1, 0, 0.0, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer = Trainer(model, model, cross_entropy, optimizer, schedule, scaler, PROCESS, RunLog(None), epochs=1)
    assert trainer.train_one_epoch(batches(1), 0)["lr"] == pytest.approx(0.1)
