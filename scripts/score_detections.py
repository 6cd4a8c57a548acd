"""Score detections as COCO does: average precision and recall of boxes or masks.

    python scripts/score_detections.py --annotations instances_val2017.json --detections detections.json
    python scripts/score_detections.py --annotations instances_val2017.json --detections detections.json \
      --iou_type segm --classes classes.csv

Annotations and detections are files in COCO's format. All images of the annotations count, those without detections
too. The twelve lines are those of pycocotools, with its values: -1.000 where there is no object to find.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks.detection.files import read_annotations, read_detections
from tasks.detection.scores import BOX, MASK, score, write_classes
from tasks.tables import check_output
from utils import UserError, count, print_line, run_script, user_path

KINDS = dict(bbox=BOX, segm=MASK)


def about(annotations: dict, detections: list[dict]) -> list[str]:
    """Lines that say what is scored, and how many images have no detection, where there are any."""
    images, objects = annotations["images"], annotations["annotations"]
    crowds = sum(int(entry.get("iscrowd", 0)) for entry in objects)
    lines = [f"{count(len(images), 'image')}, {count(len(objects), 'object')} ({count(crowds, 'crowd')}), "
             f"{count(len(detections), 'detection')}"]
    empty = len({image["id"] for image in images} - {entry["image_id"] for entry in detections})
    return lines + ([f"{count(empty, 'image')} without detections, counted too"] if empty else [])


def run(annotations: Path, detections: Path, kind: str, classes: Path | None):
    """Print the scores of a file of detections, of `BOX` or `MASK`, and write the table by class where one is asked
    for.

    Raises:
        UserError: A file cannot be read or written or is wrong, or the detections do not belong to the annotations.
    """
    if classes is not None:
        check_output(classes)
    truth, found = read_annotations(annotations), read_detections(detections)
    try:
        scores = score(truth, found, kind)
    except UserError as error:
        raise UserError(f"{detections}, scored by {annotations}: {error}") from error
    print(*about(truth, found), *scores.lines(), sep="\n")
    if classes is not None:
        write_classes(classes, [scores])
        print_line(f"by class: {classes}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, type=user_path, metavar="JSON",
                        help="what there is in the images, in COCO's format")
    parser.add_argument("--detections", required=True, type=user_path, metavar="JSON",
                        help="what was found in them, in COCO's format of results")
    parser.add_argument("--iou_type", default="bbox", choices=list(KINDS),
                        help="score boxes, or masks, which the detections are to have (default: %(default)s)")
    parser.add_argument("--classes", type=user_path, metavar="CSV", help="write the scores of each class to this file")
    args = parser.parse_args(argv)
    return run_script(lambda: run(args.annotations, args.detections, KINDS[args.iou_type], args.classes))


if __name__ == "__main__":
    sys.exit(main())
