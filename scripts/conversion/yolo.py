"""The labels of YOLO: a text file for each image, and data.yaml, or folders whose names say what is in them."""
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import yaml

from training.data.files import is_image, list_folder
from utils import UserError, count, one_line, print_line, some

from .reading import (
    SPLITS,
    check_names,
    images_below,
    inside,
    is_empty,
    numbers,
    read_classes,
    read_text,
    split_folders,
)
from .samples import BadSampleError, Picture, Sample, Source, Thing

# By how much a share of a side may be below 0 or above 1: half a pixel of a small image, written with few digits.
ROUNDING = 1e-3


# --- label files ------------------------------------------------------------------------------------------------------


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


# --- data.yaml --------------------------------------------------------------------------------------------------------


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
        settings = yaml.BaseLoader(read_text(path)).get_single_data()
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


# --- data sets --------------------------------------------------------------------------------------------------------


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
