"""Faults of a run that trains a detector: its batches hold masks, its images have sizes that are drawn, and its objects
lie in a file that others may edit.
"""
import os
import random
import signal
import time
from functools import partial

from helpers.objects import read_annotations, write_annotations, write_objects
from training.signals import EXIT_RESUME

from .kills import kill, kill_worker
from .loader import fill_shared_memory
from .runs import Course, Fault, Subject, Verdict, expect, reach_step
from .state import first_wrong, leave, refused

# Of so many images that an epoch has all of them, on one process and on two.
DETECTOR = Subject(
    "detector", partial(write_objects, train=8, val=3),
    ("--task", "detection", "--fpn_channels", "16", "--head_channels", "32", "--short_side", "64", "--long_side", "96",
     "--multi_scale", "--batch_size", "1", "--warmup_epochs", "0", "--lr", "0.5"), epochs=2,
)  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------------------


def _change_annotations(course: Course, rng: random.Random) -> Verdict:
    """In the middle of an epoch; the run is resumed once they are as they were."""
    verdict = leave(course, rng, within_epoch=True, most=2)
    before, content = (read_annotations(course.data, "train") for _ in range(2))
    changed = rng.choice(content["annotations"])
    change = rng.choice(["box", "class", "mask", "gone"])
    if change == "box":
        changed["bbox"][2] -= 1
    elif change == "class":
        changed["category_id"] = next(x["id"] for x in content["categories"] if x["id"] != changed["category_id"])
    elif change == "mask":
        changed["segmentation"][0][0] += 3
    else:
        content["annotations"].remove(changed)
    write_annotations(course.data, "train", content)
    try:
        wrong = refused(course, "written in the middle of an epoch")
        return first_wrong(verdict, wrong and f"{change}: {wrong}")
    finally:
        write_annotations(course.data, "train", before)


def _cut_off(course: Course, rng: random.Random) -> Verdict:
    """A photograph loses its end while the first epoch is on, so that the second, at the latest, reads what is left."""
    place = course.folder.with_name(f"{course.folder.name}-{next(course.starts)}-skips")
    run = Course(course.data, place, course.world_size, course.subject)
    photo = rng.choice(sorted((course.data / "train2017").iterdir()))
    whole = photo.read_bytes()
    attempt = run.start("--skip_bad_images", "--disable_eval", "--num_workers", rng.choice("012"))
    reach_step(attempt, rng.randint(1, 3))
    photo.write_bytes(whole[:rng.randrange(len(whole) // 2)])
    try:
        return expect(attempt, {0}, f"skipped 1 image that could not be read: {photo}")
    finally:
        photo.write_bytes(whole)


# --- evaluation -------------------------------------------------------------------------------------------------------


def _strike_in_evaluation(number: signal.Signals, rank: str, moment: str):
    """Have a process send itself a signal in its first evaluation, before detections are gathered or are scored."""
    from tasks.detection import metrics

    owner, name = {"gather": (metrics.DetectionScores, "compute"), "score": (metrics, "score")}[moment]
    original = getattr(owner, name)

    def struck(*args):
        if os.environ["RANK"] == rank:
            setattr(owner, name, original)
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # in which the others go on to wait for it
        return original(*args)

    setattr(owner, name, struck)


def _leave_in_evaluation(course: Course, rng: random.Random) -> Verdict:
    rank, moment = rng.choice([("0", "gather"), ("0", "score"), ("1", "gather")])
    attempt = course.start("--num_workers", "1", prepare=partial(_strike_in_evaluation, signal.SIGTERM, rank, moment))
    return expect(attempt, {EXIT_RESUME}, " --auto_resume")


def _drop_rank_in_evaluation(course: Course, rng: random.Random) -> Verdict:
    """The other one waits for its detections, or for the scores of all."""
    rank, moment = rng.choice([("0", "score"), ("1", "gather")])
    attempt = course.start("--num_workers", "1", prepare=partial(_strike_in_evaluation, signal.SIGKILL, rank, moment))
    return expect(attempt, {1, -signal.SIGKILL}, "another process of the run ended")


_of_detector = partial(Fault, subject=DETECTOR)
FAULTS = [
    _of_detector("a detector: SIGKILL at a random moment", kill, times=3),
    _of_detector("a detector: a data loading process killed", kill_worker, times=2),
    _of_detector("a detector: annotations changed in the middle of an epoch", _change_annotations, times=3),
    _of_detector("a detector: a photograph cut off, and skipped", _cut_off),
    _of_detector("two processes of a detector: SIGTERM while detections are scored", _leave_in_evaluation,
                 world_size=2, times=2),
    _of_detector("two processes of a detector: one killed while detections are scored", _drop_rank_in_evaluation,
                 world_size=2, times=2),
]
if os.geteuid() == 0:  # who else may mount another
    FAULTS.append(_of_detector("a detector: a small /dev/shm", fill_shared_memory("16k", "32k", "64k"), times=2))
