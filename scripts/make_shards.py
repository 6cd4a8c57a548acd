"""Pack a folder of images, SPLIT/CLASS/IMAGE, into WebDataset shards, with the index that training reads.

    python scripts/make_shards.py /path/to/imagenet-1k /path/to/shards --size 1000

Writes SPLIT-000000.tar and so on and, at the end, the index `_info.json`: the names of the classes, and the number of
samples, the sha256 and the size of each shard. The images of a split are shuffled first, so that every shard has images
of all classes; the same folder, size and seed give the same bytes. Classes are numbered as in training on the folder.

Each image is decoded once, so that none is packed that training could not read.
"""
import argparse
import io
import json
import random
import sys
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
from datasets import ImageDataset, Reading, ValSplit, build_dataset, check_same_classes
from storage.remote import sha256_of
from training.advice import with_advice
from training.data.folders import NoValFolderError, ValFolderError
from training.data.images import UnreadableImageError, load_image
from training.data.shard_list import INFO_NAMES
from training.data.splits import check_is_no_class
from utils import UserError, count, printable, replace_file, run_script, user_path

ADVICE = {
    NoValFolderError: "--val_split 0.1 holds a tenth of the training images out instead; or pack --splits train alone",
    ValFolderError: "leave out --val_split",
}


def why_unreadable(image: Path) -> str | None:
    """Why training could not read an image; None where it can."""
    try:
        load_image(image, exif_transpose=False)
    except UnreadableImageError as error:
        return str(error)
    return None


def readable(samples: list[tuple[int, Path, int]], errors: Iterable[str | None]) -> list[tuple[int, Path, int]]:
    """The samples without an error; the errors of the others are printed."""
    found = []
    for sample, error in zip(samples, errors, strict=True):
        if error is None:
            found.append(sample)
        else:
            print(f"\r{printable(error)}", file=sys.stderr)  # over the progress
    return found


def write_shard(path: Path, samples: list[tuple[int, Path, int]]):
    """Write each sample, (number, image file, class index), as two members: NUMBER-NAME.jpg and NUMBER-NAME.cls."""
    with tarfile.open(path, "w") as tar:
        for number, image, target in samples:
            # WebDataset groups members into samples by their names up to the first dot.
            key = f"{number:08d}-{image.stem.replace('.', '_')}"
            label = str(target).encode()
            for extension, content in ((image.suffix, image.read_bytes()), (".cls", label)):
                # Only the size: owner and time would make the bytes depend on more than the images.
                member = tarfile.TarInfo(key + extension.lower())
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_split(name: str, images: list[tuple[str, int]], output: Path, size: int, seed: int) -> dict:
    """Write the shards of a split, of `size` samples each but the last; returns the split's entry of the index.

    Images that cannot be read are left out, and named on standard error. To decode an image takes several times as long
    as to pack it, and is all that finds a JPEG cut off: threads share it, since Pillow decodes without Python's lock.
    """
    images = sorted(images)
    random.Random(seed).shuffle(images)
    samples = [(number, Path(image), target) for number, (image, target) in enumerate(images)]
    parts = [samples[start:start + size] for start in range(0, len(samples), size)]
    paths = [output / f"{name}-{number:06d}.tar" for number in range(len(parts))]
    hashes = []
    with ThreadPoolExecutor() as threads:
        for number, path in enumerate(paths):
            errors = threads.map(why_unreadable, (image for _, image, _ in parts[number]))
            parts[number] = readable(parts[number], errors)
            write_shard(path, parts[number])
            hashes.append(sha256_of(path))
            print(f"\r{name}: {len(hashes)} of {len(parts)} shards", end="", flush=True)
    print()
    return dict(
        name=name,
        num_samples=sum(map(len, parts)),
        filenames=[path.name for path in paths],
        shard_lengths=[len(part) for part in parts],
        sha256=hashes,
        shard_bytes=[path.stat().st_size for path in paths],
    )


def open_splits(args: argparse.Namespace) -> dict[str, ImageDataset]:
    """The splits of the folder by name; what a user should know about them is printed."""
    reading = Reading(val_split=args.val_split and ValSplit(args.val_split, args.seed))
    sources = {
        split: build_dataset("image_folder", args.folder, split, most_classes=args.nb_classes, reading=reading)
        for split in args.splits
    }
    for note in dict.fromkeys(note for dataset in sources.values() for note in dataset.notes):
        print(note)
    return sources


def make_shards(args: argparse.Namespace) -> list[str]:
    """Pack the splits of a folder; returns the names of the classes.

    Raises:
        UserError: A split is missing, the splits have different classes, the output already has an index or would be
            taken for a class, or images cannot be read and are not to be skipped.
    """
    output = args.output
    check_is_no_class(output, args.folder, str(output))
    existing = [output / name for name in INFO_NAMES if (output / name).exists()]
    if existing:
        raise UserError(f"{existing[0]} already exists; choose another output folder")
    sources = open_splits(args)
    classes = sources[args.splits[0]].classes
    if args.nb_classes is not None and args.nb_classes < len(classes):
        raise UserError(f"{args.nb_classes} classes were asked for, fewer than the {len(classes)} folders")
    for source in sources.values():
        check_same_classes(classes, source.classes)
    output.mkdir(parents=True, exist_ok=True)
    info = {
        split: write_split(split, dataset.source.samples, output, args.size, args.seed)
        for split, dataset in sources.items()
    }
    bad = sum(len(dataset) - info[split]["num_samples"] for split, dataset in sources.items())
    if bad and not args.skip_bad_images:
        raise UserError(f"{count(bad, 'image')} could not be read: remove what is named, or pass --skip_bad_images")
    listed = json.dumps(dict(num_classes=len(classes), classes=classes, splits=info), indent=1)
    replace_file(output / INFO_NAMES[0], lambda file: file.write(listed.encode()))
    return classes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path,
                        help="folder of SPLIT/CLASS/IMAGE or, with --val_split, of CLASS/IMAGE")
    parser.add_argument("output", type=user_path, help="folder for the shards")
    parser.add_argument("--splits", nargs="+", choices=["train", "val", "test"], default=["train", "val"],
                        help="which to pack (default: train val)")
    parser.add_argument("--val_split", type=float, metavar="SHARE",
                        help="share of each class that is held out as val, where there is no folder val")
    parser.add_argument("--nb_classes", type=int, help="classes of the network, if it has more than there are folders: "
                                                       "ImageNet's for folders of some of its synsets")
    parser.add_argument("--skip_bad_images", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--size", type=int, default=1000, help="samples per shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the shuffle, and of --val_split (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.size < 1:
        parser.error(f"--size must be at least 1, got {args.size}")
    if args.val_split is not None and not 0 < args.val_split < 1:
        parser.error(f"--val_split must be above 0 and below 1, got {args.val_split}")

    def run():
        try:
            classes = make_shards(args)
        except UserError as error:
            raise UserError(with_advice(error, ADVICE)) from error
        print(f"{len(classes)} classes; train with --data_set wds/NAME --data_path {args.output}")

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())
