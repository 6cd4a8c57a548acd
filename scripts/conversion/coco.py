"""Images with their objects in COCO's format; what cannot be converted is named, or left out."""
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from tqdm import tqdm

from training.data.images import UnreadableImageError, load_image, reading
from utils import UserError, count, printable

from .samples import BadSampleError, Converted, Picture, Read, Sample, Source

# Lines about images that cannot be converted.
MOST_BAD = 20


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
