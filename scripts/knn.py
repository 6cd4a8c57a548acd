"""Compare frozen networks on a data set: accuracy by nearest neighbours, and by a linear classifier of their features.

    python scripts/knn.py biformer_nano debiformer_nano --data_path photos --val_split 0.2
    python scripts/knn.py runs/mine/best.pth resnet50 --data_set CIFAR10 --data_path cifar --output features.csv

Each network is a checkpoint file, or a model of timm's with its published weights. It is not trained: it turns every
image into the features that its classifier would be given. Of these,

- k-NN asks the k most similar training images, by their cosine, for the class;
- the linear probe is a logistic regression, whose L2 penalty is chosen on a tenth of the training images.

The accuracies are those on the images of `--split`, which are used for nothing else.
"""
import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import training.startup  # before torch, as main.py does  # noqa: E402, F401  # isort: skip
import torch  # noqa: E402

from datasets import check_same_classes  # noqa: E402
from scripts.probing.classifiers import LinearProbe, knn_predictions  # noqa: E402
from scripts.probing.features import Extractor  # noqa: E402
from tasks.classification.options import check_val_split  # noqa: E402
from tasks.options import image_size  # noqa: E402
from tasks.tables import check_output, write_csv  # noqa: E402
from training.distributed import init_distributed  # noqa: E402
from training.options import LoaderOptions  # noqa: E402
from utils import count, positive_count, run_script, user_path  # noqa: E402

DATA_SETS = ("image_folder", "CIFAR10", "CIFAR100", "digits")


def percent(found: torch.Tensor, targets: torch.Tensor) -> float:
    return 100 * (found == targets).double().mean().item()


def evaluate(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Accuracies in percent of one network, by classifier; prints them."""
    extractor = Extractor.of(name, args, args.distributed)
    sets = {split: extractor.split(args, split) for split in ("train", args.split)}
    options = LoaderOptions(batch_size=args.batch_size, num_workers=args.num_workers)
    check_same_classes(*(dataset.classes for dataset in sets.values()))
    train, test = (extractor.extract(dataset, options) for dataset in sets.values())
    found = {
        f"{k}-NN": percent(classes, test.targets)
        for k, classes in knn_predictions(train.values, train.targets, test.values, args.k).items()
    }
    probe = LinearProbe(train.values, train.targets, train.num_classes)
    probe.fit(probe.choose_penalty(args.seed))
    found["linear"] = percent(probe.predict(test.values), test.targets)
    values = "  ".join(f"{key} {value:.2f}" for key, value in found.items())
    print(f"{name}: {values}  ({train.values.shape[1]} features, {extractor.images.description}, "
          f"{count(len(train.targets), 'training image')}, {count(len(test.targets), 'image')} of {args.split})")
    return found


def compare(args: argparse.Namespace):
    check_val_split(args.data_set, args.val_split)
    if args.output:
        check_output(args.output)
    args.distributed = init_distributed(args.device)
    results = {name: evaluate(name, args) for name in args.networks}
    if args.output:
        titles = list(next(iter(results.values())))
        rows = ([name, *(f"{found[title]:.3f}" for title in titles)] for name, found in results.items())
        write_csv(args.output, [["network", *titles], *rows])


def share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {text}")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", metavar="NETWORK", help="a checkpoint, or a model that timm knows")
    parser.add_argument("--data_path", type=user_path, metavar="FOLDER",
                        help="train/ and val/, or with --val_split the class folders; for CIFAR, its folder")
    parser.add_argument("--data_set", default="image_folder", choices=DATA_SETS, help="(default: %(default)s)")
    parser.add_argument("--val_split", type=share, metavar="SHARE", help="of each class, where there is no val/")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="(default: %(default)s)")
    parser.add_argument("--k", type=positive_count, nargs="+", default=[10, 20], help="neighbours (default: 10 20)")
    parser.add_argument("--input_size", type=image_size, metavar="PIXELS",
                        help="side of the image, or HEIGHTxWIDTH (default: each network's own)")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="write the accuracies as CSV too")
    parser.add_argument("--seed", type=int, default=0, help="of --val_split, and of the choice of the penalty")
    parser.add_argument("--batch_size", type=positive_count, default=64)
    parser.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu (default: %(default)s)")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"],
                        help="mixed precision; auto: bf16 if the GPU has it (default: %(default)s)")
    return run_script(lambda: compare(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
