"""How fast a core decodes and augments images, and how many cores one GPU therefore needs.

Encoded images lie in memory, so that neither disk nor network counts. One thread; what a row does with an image is what
a worker of `datasets.build_loader` does with it.
"""
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.io import ImageReadMode, decode_image

from datasets import ImageDataset, build_dataset, build_loader, build_transform, load_image, seeded
from training.options import build_parser
from utils import derive_seed, seed_generators

from .timing import interleave, machine, summarize
from .trial import Trial

# By format: how it is written where a photograph comes in another. JPEG is what the pipelines read, as ImageNet is.
FORMATS = {"JPEG": dict(quality=90), "WEBP": dict(quality=90), "PNG": {}}
# What most of ImageNet's photographs measure.
WIDTH, HEIGHT = 500, 375
SIDE = 224
# Of the loader: small, so that a pass does not end with most workers idle.
BATCH = 8
BATCHES_A_WORKER = 4
# Seeding takes microseconds; one sample of it is this many passes.
SEEDINGS = 20
DECODE = "decode"
TRAIN = "decode + training transform"
EXAMPLE_RATES = {f"an example, {rate}": float(rate) for rate in (500, 1000, 2000)}


@dataclass(frozen=True)
class Photos:
    """The same photographs in each format, encoded; `about` says what they are."""
    files: dict[str, list[bytes]]
    about: dict


class Encoded(Sequence):
    """(PIL RGB image, 0) by index: a data set's source whose files lie in memory, over and over up to `length`."""

    def __init__(self, files: Sequence[bytes], length: int | None = None):
        self.files, self.length = files, length or len(files)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return load_image(io.BytesIO(self.files[index % len(self.files)])), 0


def synthetic(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files of random clouds, whose amplitudes fall with the frequency as those of photographs do."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    files = []
    for _ in range(count):
        noise = rng.standard_normal((HEIGHT, WIDTH, 4))
        clouds = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) / frequency[..., None], (HEIGHT, WIDTH), axes=(0, 1))
        clouds /= clouds.std((0, 1))
        # brightness, common to the three colours, is most of a photograph
        pixels = 128 + 60 * clouds[..., :1] + 15 * clouds[..., 1:]
        files.append(_encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "JPEG"))
    return files


def photographs(folder: Path, count: int) -> list[bytes]:
    """Files spread evenly over an image folder's training images.

    Raises:
        UserError: There is no such folder.
    """
    samples = build_dataset("image_folder", folder, "train").source.samples
    step = max(1, len(samples) // count)
    return [Path(path).read_bytes() for path, _ in samples[::step][:count]]


def _encode(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **FORMATS[format])
    return file.getvalue()


def prepare(files: Sequence[bytes], source: str) -> Photos:
    """Each file in each format: as it is where that is its own, else encoded once more."""
    written, own, pixels = {format: [] for format in FORMATS}, [], []
    for content in files:
        with Image.open(io.BytesIO(content)) as image:
            own.append(image.format)
        image = load_image(io.BytesIO(content))
        pixels.append(image.width * image.height)
        for format in FORMATS:
            written[format].append(content if own[-1] == format else _encode(image, format))
    about = dict(
        source=source, images=len(files), mean_megapixels=float(np.mean(pixels)) / 1e6,
        kilobytes={format: float(np.mean([len(content) for content in written[format]])) / 1e3 for format in FORMATS},
        originals={format: own.count(format) for format in FORMATS},
    )
    return Photos(written, about)


def describe(photos: Photos) -> str:
    """What was measured, in a sentence."""
    about = photos.about
    sizes = ", ".join(
        f"{format} {about['kilobytes'][format]:.0f} kB ({about['originals'][format]} of {about['images']} as they came)"
        for format in FORMATS
    )
    return (f"{about['images']} images ({about['source']}), {about['mean_megapixels']:.3f} megapixels on average; "
            f"{sizes}.")


# --- decoding ---------------------------------------------------------------------------------------------------------


def by_pil(content: bytes) -> Image.Image:
    return load_image(io.BytesIO(content))


def by_pil_draft(content: bytes) -> Image.Image:
    """At the smallest of 1/1, 1/2, 1/4 and 1/8 that is no smaller than what the transforms ask for."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (SIDE, SIDE))
        image.load()
        return image


def by_torchvision(content: bytes) -> torch.Tensor:
    # frombuffer warns of read-only memory, which decode_image does not write to, so give it what may be written
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)


def by_torchvision_as_pil(content: bytes) -> Image.Image:
    return Image.fromarray(by_torchvision(content).permute(1, 2, 0).numpy())


DECODERS = {
    "PIL": by_pil,
    "torchvision": by_torchvision_as_pil,
    "torchvision, left as a tensor": by_torchvision,
    "PIL, draft": by_pil_draft,
}


def compare(files: Iterable[bytes], decode: Callable[[bytes], Any]) -> dict:
    """How many images have PIL's very pixels, and the largest difference of a value; None where sizes differ."""
    differences = []
    for content in files:
        expected, found = np.asarray(by_pil(content)), decode(content)
        found = found.permute(1, 2, 0).numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        same_size = found.shape == expected.shape
        differences.append(int(np.abs(found.astype(int) - expected).max()) if same_size else None)
    sizes_agree = None not in differences
    return dict(equal=differences.count(0), largest_difference=max(differences) if sizes_agree else None)


def _each(files: Sequence[bytes], decode: Callable[[bytes], Any]) -> Callable[[], None]:
    def run():
        for content in files:
            decode(content)

    return run


# --- augmentation and the loader --------------------------------------------------------------------------------------


def transforms() -> dict[str, Callable[[Image.Image], torch.Tensor]]:
    """Transforms at 224 by the names of their rows; training's are the recipe's defaults."""
    recipe = build_parser().parse_args([])
    common = dict(input_size=SIDE, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    training = dict(train=True, scale=tuple(recipe.scale), ratio=tuple(recipe.ratio), hflip=recipe.hflip,
                    interpolation=recipe.train_interpolation, **common)
    return {
        "decode + evaluation transform": build_transform(train=False, **common),
        f"{TRAIN} without {recipe.aa}": build_transform(color_jitter=None, **training),
        TRAIN: build_transform(auto_augment=recipe.aa, **training),
    }


def _dataset(source: Encoded, transform: Callable) -> ImageDataset:
    return ImageDataset(source, transform=transform)


def _in_process(dataset: ImageDataset) -> Callable[[], None]:
    def run():
        with seeded(0):  # the same crops and operations in each round
            for index in range(len(dataset)):
                dataset[index]

    return run


def _by_workers(dataset: ImageDataset, workers: int) -> Callable[[], None]:
    loader = build_loader(dataset, train=True, batch_size=BATCH, num_workers=workers, device="cpu",
                          mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)

    def run():
        for _ in loader.loader:  # batches of uint8: a GPU normalises them, and on the CPU that would count here
            pass

    return run


def _seeding(count: int) -> Callable[[], None]:
    """What the loader adds to each image: a seed in the main process, and generators started from it in a worker."""
    def run():
        for index in range(count):
            seed_generators(derive_seed(0, 0, index), torch.default_generator.manual_seed)

    return run


def measure(photos: Photos, trial: Trial) -> list[dict]:
    """Rows of images per second: decoders of each format, then transforms, the loader and seeding, all on JPEG files.

    A row's `ratio` is to PIL's decoding of the same files, its `workers` the processes that share its work.
    """
    runs, rows = {}, []

    def add(row: dict, run: Callable[[], None], images: int, workers: int = 1):
        name = ", ".join(str(row[key]) for key in ("kind", "name", "format"))
        runs[name] = run
        rows.append(dict(row, contender=name, images=images, workers=workers))

    for format, files in photos.files.items():
        for name, decode in DECODERS.items():
            if name == "PIL, draft" and format != "JPEG":
                continue
            row = dict(kind=DECODE, name=name, format=format)
            with trial.guard(f"{DECODE}, {name}, {format}"):
                row.update(compare(files, decode))
            add(row, _each(files, decode), len(files))
    files = photos.files["JPEG"]
    row = dict(kind="pipeline", format="JPEG")
    for name, transform in transforms().items():
        add(dict(row, name=name), _in_process(_dataset(Encoded(files), transform)), len(files))
    for workers in dict.fromkeys((1, machine(torch.device("cpu"))["cores"])):
        dataset = _dataset(Encoded(files, _whole_batches(len(files), workers)), transforms()[TRAIN])
        name = f"the loader, training, {workers} worker{'s' if workers > 1 else ''}"
        add(dict(row, name=name), _by_workers(dataset, workers), len(dataset), workers)
    add(dict(row, name="seeding alone"), _seeding(SEEDINGS * len(files)), SEEDINGS * len(files))

    seconds = interleave(runs, trial)
    return [_finished(row, seconds, len(files), trial) for row in rows]


def _whole_batches(images: int, workers: int) -> int:
    """The images of a pass: at least `images`, and equally many whole batches for each worker."""
    share = workers * BATCH
    return share * max(BATCHES_A_WORKER, -(-images // share))


def _finished(row: dict, seconds: dict[str, list[float]], files: int, trial: Trial) -> dict:
    if row["contender"] in trial.failures:
        return dict(row, failed=trial.failures[row["contender"]])
    reference = seconds.get(f"{DECODE}, PIL, {row['format']}")
    if reference is not None:
        reference = [s * row["images"] / files for s in reference]  # as if it were of as many images
    return dict(row, **summarize(seconds[row["contender"]], reference, row["images"]))


# --- cores for one GPU ------------------------------------------------------------------------------------------------


def recorded_rates(folder: Path) -> dict[str, float]:
    """Images per second of training by model, from the newest record of a GPU in `folder`; empty if there is none."""
    newest, rates = "", {}
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        rows = record.get("results") or record.get("sections", {}).get("models", {}).get("rows", [])
        trained = {
            f"{row['model']}, batch {row['batch']}": row["images_per_second"]
            for row in rows if row.get("mode") == "train" and "images_per_second" in row and "batch" in row
        }
        on_gpu = str(record.get("settings", {}).get("device", "cpu")).startswith("cuda")
        if on_gpu and trained and record["machine"]["date"] > newest:
            newest, rates = record["machine"]["date"], trained
    return rates


def cores(rates: dict[str, float], rows: list[dict]) -> list[dict]:
    """How many cores keep up with each rate in images/s, going by the loader with a worker for each core."""
    loaders = [row for row in rows if row["name"].startswith("the loader") and "failed" not in row]
    if not loaders:
        return []
    widest = max(loaders, key=lambda row: row["workers"])
    per_core = widest["images_per_second"] / widest["workers"]
    return [
        dict(name=name, rate=rate, per_core=per_core, cores=math.ceil(rate / per_core)) for name, rate in rates.items()
    ]
