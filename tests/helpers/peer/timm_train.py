"""One training run by timm's parts, in the order in which timm's train.py puts them together; prints a line an epoch.

timm's train.py is not in its package. This follows its documentation (https://huggingface.co/docs/timm/training_script)
with the flags that `helpers.peer` gives to main.py: no mixup, no EMA weights, no mixed precision, one process.
"""
import argparse
import json
import time

import timm
import torch
from timm.data import add_img_extensions, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, dispatch_clip_grad, random_seed

import models  # noqa: F401, registers our models with timm


def create_loaders(args: argparse.Namespace, model: torch.nn.Module, device: torch.device):
    """Training and validation batches, with the augmentation of the flags."""
    config = resolve_data_config(dict(input_size=(3, args.input_size, args.input_size)), model=model)
    size = dict(input_size=config["input_size"], mean=config["mean"], std=config["std"], batch_size=args.batch_size)
    shared = dict(size, num_workers=args.num_workers, device=device, use_prefetcher=True, pin_memory=False)
    train = create_loader(
        create_dataset("", root=args.data_path, split="train", is_training=True), is_training=True,
        scale=args.scale, hflip=0.5, color_jitter=None, auto_augment=None, interpolation="bicubic", re_prob=0.0,
        **shared,
    )
    val = create_loader(
        create_dataset("", root=args.data_path, split="val"), is_training=False, crop_pct=config["crop_pct"],
        interpolation=config["interpolation"], **shared,
    )
    return train, val


def train_epoch(epoch, model, loader, optimizer, scheduler, loss_fn, clip_grad):
    """Seconds and images of one epoch."""
    model.train()
    start, images, updates = time.perf_counter(), 0, epoch * len(loader)
    for inputs, targets in loader:
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        dispatch_clip_grad(model.parameters(), value=clip_grad, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        images += len(inputs)
        scheduler.step_update(num_updates=updates)
    return time.perf_counter() - start, images


@torch.inference_mode()
def validate(model, loader) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    top1 = AverageMeter()
    for inputs, targets in loader:
        top1.update(accuracy(model(inputs), targets, topk=(1,))[0].item(), len(inputs))
    return top1.avg


def main():
    parser = argparse.ArgumentParser()
    whole = ("input_size", "epochs", "batch_size", "num_workers", "seed", "num_classes", "warmup_epochs")
    real = ("lr", "weight_decay", "warmup_lr", "min_lr", "smoothing", "clip_grad", "drop_path")
    for kind, names in ((str, ("model", "data_path")), (int, whole), (float, real)):
        for name in names:
            parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--scale", type=float, nargs=2, required=True)
    args = parser.parse_args()
    add_img_extensions(".webp")
    random_seed(args.seed)
    device = torch.device("cpu")
    model = timm.create_model(args.model, num_classes=args.num_classes, drop_path_rate=args.drop_path).to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay)
    train, val = create_loaders(args, model, device)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, step_on_epochs=False, updates_per_epoch=len(train),
    )
    scheduler.step_update(0)
    loss_fn = LabelSmoothingCrossEntropy(args.smoothing)
    for epoch in range(args.epochs):
        seconds, images = train_epoch(epoch, model, train, optimizer, scheduler, loss_fn, args.clip_grad)
        record = dict(epoch=epoch, train_seconds=seconds, train_images_per_second=images / seconds,
                      val_acc1=validate(model, val))
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
