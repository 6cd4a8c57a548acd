"""Shards from a web server that never ends, and copies of them that rot on the disk between two starts."""
import random
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from helpers.run_state import differences
from helpers.web import answered
from scripts import make_shards
from training.signals import EXIT_RESUME

from .runs import Attempt, Course, Fault, Verdict, expect, reach_step


@contextmanager
def _served(shards: Path, endless: str | None = None) -> Iterator[str]:
    """The URL of a folder of shards, of which files whose names end in `endless` have no end."""

    def answer(handler: BaseHTTPRequestHandler):
        name = handler.path[1:]
        ends = endless is None or not name.endswith(endless)
        handler.send_response(200)
        if ends:
            handler.send_header("Content-Length", str((shards / name).stat().st_size))
        handler.end_headers()
        handler.wfile.write((shards / name).read_bytes())
        while not ends:
            handler.wfile.write(bytes(2**20))

    with answered(answer) as url:
        yield url


def _shards(course: Course) -> Path:
    """The images of a course in shards, beside it."""
    folder = course.data.with_name("shards")
    if not folder.exists() and make_shards.main([str(course.data), str(folder), "--size", "16"]):
        raise RuntimeError("the shards cannot be made")
    return folder


def _beside(course: Course, name: str) -> Course:
    """A run of its own, whose data are still to be named."""
    return Course(Path(), course.folder.with_name(f"{course.folder.name}-{next(course.starts)}-{name}"), 1)


def _start(run: Course) -> Attempt:
    cache = run.folder.with_name(f"{run.folder.name}-cache")
    return run.start(
        "--data_set", "wds/photos", "--shard_cache", str(cache), "--epochs", "1", "--warmup_epochs", "0",
        "--save_every_steps", "1", "--num_workers", "1", environment=dict(no_proxy="127.0.0.1"),
    )


def _rot(course: Course, rng: random.Random) -> Verdict:
    """Bits of images flip, which no header shows, or a file loses its end."""
    shards = _shards(course)
    alone, run = Course(shards, shards.with_name("reference-shards"), 1), _beside(course, "remote")
    if not alone.folder.exists() and (verdict := expect(_start(alone), {0})):
        return verdict
    with _served(shards) as run.data:
        attempt = _start(run)
        reach_step(attempt, 1)
        attempt.ranks[0].terminate()
        if verdict := expect(attempt, {EXIT_RESUME}):
            return verdict
        for copy in run.folder.with_name(f"{run.folder.name}-cache").glob("*.shard"):
            data = bytearray(copy.read_bytes())
            for place in range(600, len(data), 2000):
                data[place] ^= 1 << rng.randrange(8)
            copy.write_bytes(data[:rng.choice([len(data), 700])])
        if verdict := expect(_start(run), {0}):
            return verdict
    lost = differences(run.folder, alone.folder)
    return f"state lost: {lost}" if lost else None


def _never_end(course: Course, rng: random.Random) -> Verdict:
    shards = _shards(course)
    run = _beside(course, "endless")
    with _served(shards, endless=rng.choice([".json", ".tar"])) as run.data:
        verdict = expect(_start(run), {1}, "cannot be fetched: the server sends")
    left = list(run.folder.parent.glob(f"{run.folder.name}-cache/*.part"))
    return f"left {left}" if left else verdict


FAULTS = [
    Fault("copies of remote shards damaged between two starts", _rot, times=2),
    Fault("a web server that never ends", _never_end, times=2),
]
