"""Convert the labels of a YOLO or Pascal VOC data set to COCO's format, which `--task detection` reads.

    python scripts/make_coco.py --format yolo /path/to/data --output coco
    python scripts/make_coco.py --format voc /path/to/VOCdevkit/VOC2012 --output coco

Writes OUTPUT/annotations/instances_train.json and instances_val.json, and instances_test.json where there is such a
split, and prints the command that trains on them. No image is copied: file names are relative to the data folder. Where
there is no val, a share of train is held out. Width and height are those of the image turned upright by its EXIF
orientation, as labelling tools show it; they are read from the file, without decoding more of it than that takes.

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
import math
import os
import random
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from PIL import ExifTags, Image
from tqdm import tqdm

from training.data.files import describe_left_out, find_images, is_hidden, is_image, list_folder
from training.data.images import UnreadableImageError, load_image, reading
from utils import UserError, count, nearest, one_line, print_line, printable, replace_file, run_script, some, user_path

# Split -> the names that its folder may have.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# By how much a share of a side may be below 0 or above 1: half a pixel of a small image, written with few digits.
ROUNDING = 1e-3
# Endings of what lies among images and is no image that a user may have meant.
NOT_MEANT = (".txt", ".xml", ".json", ".yaml", ".cache", ".npy")
MOST_BAD = 20
# Kind -> what is said of it, after a number.
WARNINGS = {
    "cut": ("object that reached out of its image was cut off at the edge",
            "objects that reached out of their images were cut off at the edge"),
    "repeated": ("object that was given twice was left out", "objects that were given twice were left out"),
    "size": ("XML file gives another size than its image has: look at its boxes",
             "XML files give another size than their images have: look at their boxes"),
}


class BadSampleError(UserError):
    """An image or its labels cannot be converted; names the file."""


@dataclass(frozen=True)
class Sample:
    """An image, its label file where it has one, and what is already known to be wrong with them."""

    image: Path
    label: Path | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Picture:
    """The sides of an image in pixels, upright, and its (width, height) as stored."""

    width: int
    height: int
    stored: tuple[int, int]


@dataclass(frozen=True)
class Thing:
    """An object: its class, corners (x1, y1, x2, y2) in pixels, and polygon (x1, y1, x2, y2, x3, y3, ...)."""

    name: str
    corners: tuple[float, ...]
    polygon: tuple[float, ...] = ()
    is_crowd: bool = False

    def area(self) -> float:
        """That of the polygon, by the shoelace formula, or else of the box."""
        if not self.polygon:
            x1, y1, x2, y2 = self.corners
            return (x2 - x1) * (y2 - y1)
        xs, ys = self.polygon[::2], self.polygon[1::2]
        return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2


# The objects in a label file of an image, and how many of them each of `WARNINGS` is about.
Read = Callable[[Path, Picture], tuple[list[Thing], Counter[str]]]


@dataclass
class Source:
    """A data set to convert.

    Args:
        root: The folder that file names are relative to.
        splits: Split -> its images.
        names: Its classes in their order; None where they are those of its objects.
        read: Reads a label file.
    """

    root: Path
    splits: dict[str, list[Sample]]
    names: list[str] | None
    read: Read


@dataclass
class Converted:
    """An image with its objects."""

    sample: Sample
    picture: Picture
    things: list[Thing] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)


# --- both formats -----------------------------------------------------------------------------------------------------


def measure(path: Path) -> Picture:
    """The size of an image.

    Raises:
        UnreadableImageError, LostDataError: As `load_image` does.
    """
    with reading(path), Image.open(path) as image:
        stored = image.size
        if image.format == "PNG":  # whose EXIF may come after its pixels
            image.load()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except MemoryError:
            raise
        except Exception:  # damaged EXIF is passed over in training too
            orientation = None
    # Few images lie on their side: they are measured as training sees them, whatever Pillow makes of their format.
    return Picture(*(load_image(path).size if orientation in (5, 6, 7, 8) else stored), stored=stored)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with a byte order mark or without."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{path}: not text in UTF-8 ({one_line(error)})") from None


def numbers(words: Iterable[str], place: str) -> list[float]:
    """Words as finite numbers; `place`, the file and the line, is for the message."""
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise BadSampleError(f"{place}: {word!r} is no number") from None
        if not math.isfinite(values[-1]):
            raise BadSampleError(f"{place}: {word} is not finite")
    return values


def inside(points: Sequence[float], picture: Picture) -> tuple[float, ...]:
    """Coordinates (x1, y1, x2, y2, ...) in pixels, moved into the image and rounded to a thousandth of a pixel."""
    sides = float(picture.width), float(picture.height)
    return tuple(round(min(max(0.0, value), sides[i % 2]), 3) for i, value in enumerate(points))


def is_empty(corners: Sequence[float]) -> bool:
    """Whether a box has no area."""
    x1, y1, x2, y2 = corners
    return x2 <= x1 or y2 <= y1


def images_below(folder: Path) -> list[Path]:
    """The images below a folder; says what lies there and is no image that can be read."""
    found = find_images(folder)
    for ending in NOT_MEANT:
        del found.left_out[ending]
    if note := describe_left_out(found.left_out, folder):
        print_line(note)
    return [Path(path) for path in found.images]


def check_names(names: list[str], place: Path) -> list[str]:
    """The names of the classes; raises UserError where there is none, one is empty, or two are the same."""
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if not names or "" in names or repeated:
        what = f"two classes have the name {repeated[0]!r}" if repeated and repeated[0] else "a class has no name"
        raise UserError(f"{place}: {what if names else 'there are no names of classes'}")
    return names


def read_classes(path: Path) -> list[str]:
    """The names of the classes in a file, one a line."""
    return check_names([line.strip() for line in read_text(path).rstrip().splitlines()], path)


def split_folders(data: Path, pattern: str) -> dict[str, Path]:
    """Split -> its folder, where the data folder has one; `pattern` is its path below, with {} for the split."""
    found = {}
    for split, aliases in SPLITS.items():
        folders = [folder for alias in aliases if (folder := data / pattern.format(alias)).is_dir()]
        if folders:
            found[split] = folders[0]
    return found


# --- YOLO -------------------------------------------------------------------------------------------------------------


def yolo_thing(words: list[str], place: str, names: list[str], picture: Picture) -> tuple[Thing, bool]:
    """The object in a row of a label file, and whether it was cut off at the edge of the image."""
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise BadSampleError(f"{place}: {count(len(words), 'column')}; a box has 5, a polygon has 7, 9, 11 or so on")
    index, *values = numbers(words, place)
    if index not in range(len(names)):
        raise BadSampleError(f"{place}: there is no class {words[0]}; {len(names)} classes count from 0")
    for word, value in zip(words[1:], values, strict=True):
        if not -ROUNDING <= value <= 1 + ROUNDING:
            raise BadSampleError(f"{place}: {word} is not from 0 to 1, as a share of the image is")
    is_polygon = len(words) > 5
    if is_polygon:
        edges = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    else:
        x, y, width, height = values
        edges = x - width / 2, y - height / 2, x + width / 2, y + height / 2

    def pixels(shares: Sequence[float]) -> tuple[float, ...]:
        return inside([value * (picture.height if i % 2 else picture.width) for i, value in enumerate(shares)], picture)

    thing = Thing(names[int(index)], pixels(edges), pixels(values) if is_polygon else ())
    if is_empty(thing.corners) or not thing.area():
        raise BadSampleError(f"{place}: the {'polygon' if is_polygon else 'box'} has no area")
    return thing, not all(-ROUNDING <= edge <= 1 + ROUNDING for edge in edges)


def read_yolo(names: list[str], label: Path, picture: Picture) -> tuple[list[Thing], Counter[str]]:
    """The objects in a label file; `Read`."""
    things, warnings = [], Counter()
    for number, line in enumerate(read_text(label).splitlines(), start=1):
        if words := line.split():
            thing, is_cut = yolo_thing(words, f"{label}:{number}", names, picture)
            things.append(thing)
            warnings["cut"] += is_cut
    return things, warnings


def label_places(image: Path) -> list[Path]:
    """Where the label file of an image may be: in labels for the last folder images above it, or beside it."""
    beside = image.with_suffix(".txt")
    parts = list(beside.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            return [Path(*parts[:i], "labels", *parts[i + 1:]), beside]
    return [beside]


def find_yaml(data: Path) -> Path | None:
    """The YAML file of a data set; None where there is none."""
    if not data.is_dir():
        return data
    found = [data / name for name in list_folder(data)[1] if name.lower().endswith((".yaml", ".yml"))]
    named = [path for path in found if path.stem == "data"]
    if len(named or found) > 1:
        raise UserError(f"{data} has several YAML files, {some([path.name for path in found])}; give the data set's "
                        "instead of the folder")
    return (named or found or [None])[0]


def read_settings(path: Path) -> dict:
    """What a YAML file says, each value as text: a class `no` is not false."""
    try:
        settings = yaml.load(read_text(path), yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({one_line(error)})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: does not describe a data set")
    if "kpt_shape" in settings:
        raise UserError(f"{path}: the labels are of key points, which this does not convert")
    return settings


def yaml_names(settings: Mapping, path: Path) -> list[str]:
    """The classes that a YAML file names, as a list or by their numbers."""
    names = settings.get("names") or []
    if isinstance(names, dict):
        missing = [str(i) for i in range(len(names)) if str(i) not in names]
        if missing:
            raise UserError(f"{path}: {count(len(names), 'name')}, but none of class {missing[0]}")
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: names are neither a list nor a mapping from numbers to names")
    check_names(names, path)
    if settings.get("nc", str(len(names))) != str(len(names)):
        raise UserError(f"{path}: nc is {settings['nc']}, but there {'is' if len(names) == 1 else 'are'} "
                        f"{count(len(names), 'name')}")
    return names


def locate(entry: str, folders: list[Path]) -> Path | None:
    """What a YAML file means by a path: the first that is there.

    Those of Roboflow begin with `../` though they lie beside the file.
    """
    for path in (entry, re.sub(r"^(\.\./)+", "", entry)):
        for folder in folders:
            if path and (folder / path).exists():
                return Path(os.path.abspath(folder / path))
    return None


def listed_images(path: Path, folders: list[Path]) -> list[Sample]:
    """The images that a text file lists, one a line."""
    samples = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if entry := line.strip():
            image = locate(entry, [path.parent, *folders])
            problem = None if image else f"{path}:{number}: there is no image {entry}"
            samples.append(Sample(image or path.parent / entry, problem=problem))
    return samples


def yaml_splits(settings: Mapping, path: Path, folders: list[Path]) -> dict[str, list[Sample]]:
    """Split -> the images that a YAML file names: folders, or text files that list them."""
    splits = {}
    for split, aliases in SPLITS.items():
        given = next((settings[alias] for alias in aliases if settings.get(alias)), [])
        for entry in given if isinstance(given, list) else [given]:
            place = locate(entry, folders) if isinstance(entry, str) else None
            if place is None and split == "test":  # many name one that was never downloaded
                print_line(f"left out the split test: {path} names {entry}, which does not exist")
                continue
            if place is None:
                raise UserError(f"{path}: {split} is {entry}, which does not exist")
            if place.is_dir():
                found = [Sample(image) for image in images_below(place)]
            elif place.suffix.lower() == ".txt":
                found = listed_images(place, folders)
            else:
                raise UserError(f"{path}: {split} is {entry}, neither a folder nor a text file that lists images")
            splits.setdefault(split, []).extend(found)
    return splits


def with_labels(splits: Mapping[str, list[Sample]]) -> dict[str, list[Sample]]:
    """The images of YOLO's splits with their label files, each once in its split.

    Raises:
        UserError: No image has a label file.
    """
    images = {sample.image for samples in splits.values() for sample in samples if not sample.problem}
    labels = {image: next((place for place in label_places(image) if place.is_file()), None) for image in images}
    if images and not any(labels.values()):
        image = min(images)
        raise UserError(f"none of {count(len(images), 'image')} has a label file: for {image}, there is no "
                        f"{' nor '.join(map(str, label_places(image)))}")
    sharing = defaultdict(list)
    for image in sorted(images):
        if labels[image]:
            sharing[labels[image]].append(image)

    def labelled(sample: Sample) -> Sample:
        label = labels.get(sample.image)
        others = [image.name for image in sharing[label]] if label else []
        problem = f"{label}: {' and '.join(others)} share it; rename them" if len(others) > 1 else sample.problem
        return Sample(sample.image, label, problem)

    warn_of_stray_labels(images)
    return {split: list(dict.fromkeys(map(labelled, samples))) for split, samples in splits.items()}


def warn_of_stray_labels(images: set[Path]):
    """Say how many files in folders of labels are of no image."""
    folders = {label_places(image)[0].parent: image.parent for image in images}
    stray = []
    for labels, pictures in sorted(folders.items()):
        if labels == pictures or not labels.is_dir():
            continue
        stems = {Path(name).stem for name in list_folder(pictures)[1] if is_image(name)} | {"classes"}
        stray += [str(labels / name) for name in list_folder(labels)[1]
                  if name.endswith(".txt") and Path(name).stem not in stems]
    if stray:
        verb = "has" if len(stray) == 1 else "have"
        print_line(f"warning: {count(len(stray), 'label file')} {verb} no image: {some(stray, 3)}")


def open_yolo(data: Path, classes: Path | None) -> Source:
    """A data set of YOLO's, by its YAML file or by the names of its folders."""
    names = read_classes(classes) if classes else None
    path = find_yaml(data)
    if path:
        settings = read_settings(path)
        names = names or yaml_names(settings, path)
        given = settings.get("path")
        # Of another machine, often; a relative one begins at the file or, as YOLO reads it, where it is run.
        paths = [path.parent / given, Path(given)] if isinstance(given, str) and given else []
        folders = [Path(os.path.abspath(folder)) for folder in (*paths, path.parent) if folder.is_dir()]
        splits, root = yaml_splits(settings, path, folders), folders[0]
        if not splits:
            raise UserError(f"{path}: names neither train nor val nor test")
    else:
        root = data
        places = split_folders(data, "images/{}") or split_folders(data, "{}/images")
        if not places and (data / "images").is_dir():
            places = dict(train=data / "images")
        if not places:
            raise UserError(f"{data} has no data.yaml, nor folders images/train or train/images")
        listed = [file for file in (data / "classes.txt", data / "labels" / "classes.txt") if file.is_file()]
        if not names and not listed:
            raise UserError(f"{data} has neither data.yaml nor classes.txt; name the classes by --classes FILE")
        names = names or read_classes(listed[0])
        splits = {split: [Sample(image) for image in images_below(folder)] for split, folder in places.items()}
    splits = with_labels(splits)
    parents = {sample.image.parent for samples in splits.values() for sample in samples if not sample.problem}
    if not all(parent.is_relative_to(root) for parent in parents):
        root = Path(os.path.commonpath([root, *parents]))
    return Source(root, splits, names, partial(read_yolo, names))


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def read_xml(path: Path) -> tuple[ElementTree.Element, dict[ElementTree.Element, int]]:
    """The root of an XML file, and the line that each element begins in.

    A document type is refused before what it declares is read: its entities can make gigabytes of a short text.
    """
    builder, lines, parser = ElementTree.TreeBuilder(), {}, expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]):
        lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

    def refuse(*_):
        raise BadSampleError(f"{path}:{parser.CurrentLineNumber}: has a DOCTYPE, which VOC's XML has not; remove it")

    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    content = path.read_bytes()
    try:
        parser.Parse(content, True)
    except BadSampleError:
        raise
    except expat.ExpatError as error:
        raise BadSampleError(f"{path}:{error.lineno}: not XML ({expat.ErrorString(error.code)})") from None
    except (LookupError, ValueError):
        raise BadSampleError(f"{path}: in an encoding that cannot be read; save it in UTF-8") from None
    return builder.close(), lines


def check_size(root: ElementTree.Element, label: Path, picture: Picture) -> bool:
    """Whether an XML file gives the size of its image, or none.

    Raises:
        BadSampleError: It gives that of an image which training turns upright, and so do its boxes.
    """
    try:
        size = tuple(float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    except ValueError:
        return True
    if size in ((0, 0), (picture.width, picture.height)):
        return True
    if size == picture.stored:
        raise BadSampleError(f"{label}: its boxes are of the image as stored, {size[0]:g} x {size[1]:g}, which EXIF "
                             "turns upright; save the image without its orientation")
    return False


def read_voc(known: list[str] | None, label: Path, picture: Picture) -> tuple[list[Thing], Counter[str]]:
    """The objects in an XML file; `Read`. Classes are those `known`, where that is not None."""
    root, lines = read_xml(label)
    if root.tag != "annotation":
        raise BadSampleError(f"{label}:{lines[root]}: <{root.tag}> is not <annotation>, as VOC's XML is")
    things, warnings = [], Counter(size=not check_size(root, label, picture))
    for element in root.findall("object"):
        place = f"{label}:{lines[element]}"
        name = element.findtext("name", "").strip()
        if not name:
            raise BadSampleError(f"{place}: an object without a name")
        if known is not None and name not in known:
            raise BadSampleError(f"{place}: class {name!r} is not in --classes{nearest(name, known)}")
        box = element.find("bndbox")
        if box is None:
            raise BadSampleError(f"{place}: an object without bndbox")
        place = f"{label}:{lines[box]}"
        texts = [box.findtext(side, "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
        xmin, ymin, xmax, ymax = numbers(texts, place)
        if xmax < xmin or ymax < ymin:
            raise BadSampleError(f"{place}: xmax or ymax is below xmin or ymin: {' '.join(texts)}")
        corners = inside((xmin - 1, ymin - 1, xmax, ymax), picture)
        is_outside = min(xmin, ymin) < 0 or xmax > picture.width + 1 or ymax > picture.height + 1
        if is_outside or is_empty(corners):
            raise BadSampleError(f"{place}: the box {' '.join(texts)} is not in the image, "
                                 f"{picture.width} x {picture.height}")
        warnings["cut"] += min(xmin, ymin) < 1 or xmax > picture.width or ymax > picture.height
        is_difficult = element.findtext("difficult", "").strip().lower() in ("1", "true")
        things.append(Thing(name, corners, is_crowd=is_difficult))
    return things, warnings


def xml_files(folder: Path) -> list[Path]:
    """The XML files below a folder, but for hidden ones; none where there is no folder."""
    found = sorted(folder.rglob("*.[xX][mM][lL]"))
    return [path for path in found if not any(map(is_hidden, path.relative_to(folder).parts))]


def voc_samples(folder: Path) -> dict[str, Sample]:
    """Name -> the XML file of this name, without its ending, and its image: in folders of their own, or together."""
    # annotations may also be an empty folder of an earlier output
    places = [folder / "Annotations", folder / "annotations", folder]
    annotations = next((place for place in places if xml_files(place)), folder)
    names = ("JPEGImages", "images") if annotations != folder else ()
    pictures = next((place for name in names if (place := folder / name).is_dir()), folder)
    by_name = defaultdict(list)
    for image in images_below(pictures):
        by_name[image.relative_to(pictures).with_suffix("").as_posix()].append(image)
    samples = {}
    for label in xml_files(annotations):
        name = label.relative_to(annotations).with_suffix("").as_posix()
        images = by_name.pop(name, [])
        problem = None
        if not images:
            problem = f"{label}: there is no image {pictures / name}, with any ending"
        elif len(images) > 1:
            problem = f"{label}: {' and '.join(image.name for image in images)} share it; rename them"
        samples[name] = Sample(images[0] if images else pictures / name, label, problem)
    if by_name and samples:
        left_out = [str(image) for images in by_name.values() for image in images]
        verb = "has" if len(left_out) == 1 else "have"
        print_line(f"warning: left out {count(len(left_out), 'image')} that {verb} no XML file: {some(left_out, 3)}")
    return samples


def image_set(path: Path, samples: Mapping[str, Sample]) -> list[Sample]:
    """The images that a text file of ImageSets/Main names."""
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name = line.strip()
        if name and name not in samples:
            name = name.split()[0]  # those of one class have a second column
        if name:
            problem = f"{path}:{number}: there is no XML file of {name}"
            found[name] = samples.get(name) or Sample(path.parent / name, problem=problem)
    return list(found.values())


def open_voc(data: Path, classes: Path | None) -> Source:
    """A data set of Pascal VOC's, by its image sets or by the names of its folders."""
    if not data.is_dir():
        raise UserError(f"{data} is no folder")
    names = read_classes(classes) if classes else None
    places = split_folders(data, "{}")
    if "train" in places and not (data / "Annotations").is_dir():
        splits = {split: list(voc_samples(folder).values()) for split, folder in places.items()}
    else:
        samples = voc_samples(data)
        sets = {split: data / "ImageSets" / "Main" / f"{split}.txt" for split in (*SPLITS, "trainval")}
        found = {split: image_set(path, samples) for split, path in sets.items() if path.is_file()}
        trainval = found.pop("trainval", [])
        if trainval and not {"train", "val"} & set(found):
            found = dict(train=trainval, **found)
        splits = found or dict(train=list(samples.values()))
    if not any(splits.values()):
        raise UserError(f"{data} has no XML files, in Annotations or beside the images; is it the folder of one year?")
    return Source(data, splits, names, partial(read_voc, names))


# --- COCO -------------------------------------------------------------------------------------------------------------


def hold_out(source: Source, share: float, seed: int):
    """Make a split val of a share of train, where there is none."""
    images = source.splits.get("train", [])
    number = min(max(round(share * len(images)), 1), len(images) - 1)
    if "val" in source.splits or not share or number < 1:
        return
    chosen = set(random.Random(seed).sample(range(len(images)), number))
    train = [sample for i, sample in enumerate(images) if i not in chosen]
    source.splits = {**source.splits, "train": train, "val": [images[i] for i in sorted(chosen)]}
    print(f"held out for validation: {number} of the {len(images)} images, by seed {seed}")


def convert(sample: Sample, read: Read) -> Converted | UserError:
    """An image with its objects, each once; or what is wrong with it."""
    try:
        if sample.problem:
            raise BadSampleError(sample.problem)
        picture = measure(sample.image)
        things, warnings = read(sample.label, picture) if sample.label else ([], Counter())
    except (BadSampleError, UnreadableImageError) as error:
        return error
    once = list(dict.fromkeys(things))
    warnings["repeated"] = len(things) - len(once)
    return Converted(sample, picture, once, warnings)


def convert_splits(source: Source, skip_bad_images: bool) -> dict[str, list[Converted]]:
    """The images of each split with their objects; what is wrong is printed.

    Raises:
        UserError: There is something wrong and it is not to be skipped, or nothing is left.
    """
    converted, bad = {}, []
    for split, samples in source.splits.items():
        with ThreadPoolExecutor() as threads:
            results = threads.map(partial(convert, read=source.read), samples)
            bar = tqdm(results, desc=split, total=len(samples), disable=not sys.stderr.isatty())
            found = list(bar)
        converted[split] = [result for result in found if isinstance(result, Converted)]
        bad += [result for result in found if not isinstance(result, Converted)]
    for error in bad[:MOST_BAD]:
        print(printable(str(error)), file=sys.stderr)
    if len(bad) > MOST_BAD:
        print(f"and {len(bad) - MOST_BAD} more", file=sys.stderr)
    if bad and not skip_bad_images:
        raise UserError(f"{count(len(bad), 'image')} could not be converted: mend what is named, or leave it out by "
                        "--skip_bad_images")
    if bad:
        print(f"left out {count(len(bad), 'image')} that could not be converted")
    for split, images in converted.items():
        if not images:
            raise UserError(f"no image is left in the split {split}")
    if not any(image.things for images in converted.values() for image in images):
        raise UserError("no image has an object")
    return converted


def instances(images: list[Converted], names: list[str], root: Path) -> dict[str, Any]:
    """A split in COCO's format."""
    numbers_of = {name: i for i, name in enumerate(names, start=1)}
    categories = [dict(id=i, name=name) for name, i in numbers_of.items()]
    # `info` is empty, but pycocotools' COCO.info needs it.
    found = dict(info={}, images=[], annotations=[], categories=categories)
    for number, image in enumerate(images, start=1):
        name = image.sample.image.relative_to(root).as_posix()
        picture = image.picture
        found["images"].append(dict(id=number, file_name=name, width=picture.width, height=picture.height))
        for thing in image.things:
            x1, y1, x2, y2 = thing.corners
            found["annotations"].append(dict(
                id=len(found["annotations"]) + 1,
                image_id=number,
                category_id=numbers_of[thing.name],
                bbox=[x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
                area=round(thing.area(), 3),
                iscrowd=int(thing.is_crowd),
                segmentation=[list(thing.polygon)] if thing.polygon else [],
            ))
    return found


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
        for split in ("train", "val"):
            words += [f"--{split}_json", str(paths[split])] if split in converted else []
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
