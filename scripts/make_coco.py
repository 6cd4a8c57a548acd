"""Convert the labels of a YOLO or Pascal VOC data set to COCO's format, which `--task detection` reads.

    python scripts/make_coco.py --format yolo /path/to/data --output coco
    python scripts/make_coco.py --format voc /path/to/VOCdevkit/VOC2012 --output coco

Writes OUTPUT/annotations/instances_train.json and instances_val.json, and instances_test.json where there is such a
split, and prints the command that trains on them: Mask R-CNN, or RetinaNet where masks are missing that it needs. No
image is copied: file names are relative to the data folder. Where there is no val, a share of train is held out. Width
and height are those of the image turned upright by its EXIF orientation, as labelling tools show it; they are read from
the file, without decoding more of it than that takes.

YOLO: a folder with data.yaml (`path`, `train`, `val`, `test`, `names`), or that file itself; or folders images/SPLIT
and labels/SPLIT, SPLIT/images and SPLIT/labels, or images and labels alone, with classes.txt or --classes. A row of a
label file is a box, `class cx cy w h`, or a polygon, `class x1 y1 x2 y2 x3 y3 ...`, in shares of the image. An image
without a label file has no objects. Boxes that reach out of the image are cut off at its edge, as in training YOLO.

VOC: Annotations, JPEGImages and, for the splits, ImageSets/Main; or folders SPLIT, or one folder, of XML files beside
their images. VOC counts pixels from 1 and includes both ends (its development kit takes xmax - xmin + 1 for the width),
so that a COCO box is xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1. Up to one pixel outside of the image, where
tools that count from 0 put edges, is cut off. Difficult objects become COCO's crowds: as in VOC's own evaluation, they
are not counted, nor is what is found there an error; and they are not learnt.

Categories count from 1, in the order of data.yaml, classes.txt or --classes, or for VOC sorted by name.
"""
import argparse
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.conversion.coco import convert_splits, hold_out, instances
from scripts.conversion.reading import SPLITS
from scripts.conversion.samples import Converted
from scripts.conversion.voc import open_voc
from scripts.conversion.yolo import open_yolo
from utils import UserError, count, print_line, replace_file, run_script, some, user_path

# The splits of a training run.
TRAINED_ON = ("train", "val")
# Kind -> what is said of it, after a number.
WARNINGS = {
    "cut": ("object that reached out of its image was cut off at the edge",
            "objects that reached out of their images were cut off at the edge"),
    "repeated": ("object that was given twice was left out", "objects that were given twice were left out"),
    "size": ("XML file gives another size than its image has: look at its boxes",
             "XML files give another size than their images have: look at their boxes"),
}


def report(converted: dict[str, list[Converted]], names: list[str]):
    """Print what was converted, and what the user should look at."""
    everything = [image for images in converted.values() for image in images]
    for kind, texts in WARNINGS.items():
        concerned = [image for image in everything if image.warnings[kind]]
        if concerned:
            number = sum(image.warnings[kind] for image in concerned)
            print_line(f"warning: {number} {texts[number > 1]}, first in {concerned[0].sample.label}")
    files = {split: {image.sample.image for image in images} for split, images in converted.items()}
    shared = len(files.get("train", set()) & files.get("val", set()))
    if shared:
        print(f"warning: {count(shared, 'image')} of train {'is' if shared == 1 else 'are'} in val too")
    for split, images in converted.items():
        things = [thing for image in images for thing in image.things]
        parts = [count(len(images), "image"), f"{sum(not image.things for image in images)} of them without objects",
                 count(len(things), "object")]
        for what, number in (("with polygons", sum(bool(thing.polygon) for thing in things)),
                             ("difficult", sum(thing.is_crowd for thing in things))):
            parts += [f"{number} of them {what}"] if number else []
        print(f"{split}: {', '.join(parts)}")
    print_line(f"{count(len(names), 'class')}: {some(names, 20)}")


def has_masks(converted: dict[str, list[Converted]]) -> bool:
    """Whether Mask R-CNN can be trained; prints a warning where some objects have masks and others have none.

    It needs one in train, where objects without are left out, and that of each object in val: one that is found there
    and has no mask would count as an error.
    """
    things = {split: [thing for image in converted.get(split, []) for thing in image.things] for split in TRAINED_ON}
    bare = {split: sum(not thing.polygon for thing in found) for split, found in things.items()}
    is_enough = bare["train"] < len(things["train"]) and not bare["val"]
    number = sum(bare.values())
    if 0 < number < sum(map(len, things.values())):
        verb = "has" if number == 1 else "have"
        places = ", ".join(f"{number} in {split}" for split, number in bare.items() if number)
        what = "training leaves out what has none" if is_enough else (
            "RetinaNet is trained, on boxes alone; Mask R-CNN needs masks in train, and that of each object in val"
        )
        print(f"warning: {count(number, 'object')} {verb} no mask ({places}): {what}")
    return is_enough


def make(args: argparse.Namespace):
    """Convert a data set; prints how many images, objects and classes there are, and how to train on them."""
    if not args.data.exists():
        raise UserError(f"{args.data} does not exist")
    paths = {split: args.output / "annotations" / f"instances_{split}.json" for split in SPLITS}
    existing = [path for path in paths.values() if path.exists()]
    if existing:
        raise UserError(f"{existing[0]} already exists; remove it, or choose another output folder")
    open_source = open_yolo if args.format == "yolo" else open_voc
    source = open_source(Path(os.path.abspath(args.data)), args.classes)
    hold_out(source, args.val_share, args.seed)
    converted = convert_splits(source, args.skip_bad_images)
    things = (thing for images in converted.values() for image in images for thing in image.things)
    names = source.names or sorted({thing.name for thing in things})
    # All are made before one is written: a mistake in a later one leaves nothing behind.
    texts = {split: json.dumps(instances(images, names, source.root)) for split, images in converted.items()}
    for split, text in texts.items():
        replace_file(paths[split], lambda file, text=text: file.write(text.encode()))
    report(converted, names)
    if "train" in converted:
        words = ["python", "main.py", "--task", "detection", "--data_path", str(source.root)]
        for split in TRAINED_ON:
            words += [f"--{split}_json", str(paths[split])] if split in converted else []
        words += [] if has_masks(converted) else ["--detector", "retinanet"]
        print_line(f"train with: {shlex.join(words)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=user_path, help="folder of the data set, or its data.yaml")
    parser.add_argument("--format", required=True, choices=["yolo", "voc"], help="of the labels that are there")
    parser.add_argument("--output", required=True, type=user_path, metavar="FOLDER", help="where annotations/ goes")
    parser.add_argument("--classes", type=user_path, metavar="FILE",
                        help="names of the classes in their order, one a line (default: those of the data set)")
    parser.add_argument("--val_share", type=float, default=0.1, metavar="SHARE",
                        help="share of train to hold out where there is no val; 0: none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="by which it is chosen (default: %(default)s)")
    parser.add_argument("--skip_bad_images", action="store_true",
                        help="leave out images that cannot be read or whose labels are wrong")
    args = parser.parse_args(argv)
    if not 0 <= args.val_share < 1:
        parser.error(f"--val_share must be at least 0 and below 1, got {args.val_share}")
    return run_script(lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
