"""The labels of Pascal VOC: an XML file for each image, and image sets, which name those of a split."""
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from training.data.files import is_hidden
from utils import UserError, count, nearest, print_line, some

from .reading import SPLITS, images_below, inside, is_empty, numbers, read_classes, read_text, split_folders
from .samples import BadSampleError, Picture, Sample, Source, Thing


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
