"""How many images a core decodes and augments in a second, and how many cores one GPU therefore needs.

JPEG files lie in memory, so that neither disk nor network counts. Each row does with an image, on one thread, what a
worker of `training.data.loader.build_loader` does with it.
"""
import io
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.loader import fast_collate

from datasets import ImageDataset, build_dataset, build_transform
from tasks.classification.options import AugmentationOptions
from training.data.images import load_image
from training.data.loader import build_loader, seeded
from training.distributed import Distributed
from training.options import LoaderOptions
from utils import derive_seed, seed_generators

from .timing import Trial, interleave, machine, summarize

# The most common size of ImageNet's photographs, and the side of the crops.
WIDTH, HEIGHT, SIDE = 500, 375, 224
JPEG_QUALITY = 90
# Small batches, so that a pass of the loader does not end with most workers idle.
BATCH, BATCHES_PER_WORKER = 8, 4
# Seeding takes microseconds: one sample of it is this many passes over the images.
SEEDINGS = 20
TRAIN = "decode + training transform"
EXAMPLE_RATES = {f"an example, {rate}": float(rate) for rate in (500, 1000, 2000)}
NORMALISATION = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)


class InMemory(list):
    """Encoded images as the source of a data set: (PIL RGB image, 0) by index."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return _decode(super().__getitem__(index)), 0


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
        # The three colours share most of a photograph's contrast.
        pixels = 128 + 60 * clouds[..., :1] + 15 * clouds[..., 1:]
        files.append(_encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))))
    return files


def read_files(folder: Path | None, count: int) -> tuple[list[bytes], dict]:
    """`count` JPEG files, and what is recorded of them: source, size, and how many were JPEG files before.

    They are spread evenly over the training images of an image folder; without a folder they are synthetic. Raises
    UserError if there is no such folder.
    """
    if folder is None:
        files = synthetic(count)
    else:
        samples = build_dataset("image_folder", folder, "train").source.samples
        files = [Path(path).read_bytes() for path, _ in samples[:: max(1, len(samples) // count)][:count]]
    images = [_decode(content) for content in files]
    is_jpeg = [Image.open(io.BytesIO(content)).format == "JPEG" for content in files]
    written = [file if jpeg else _encode(image) for file, jpeg, image in zip(files, is_jpeg, images, strict=True)]
    return written, dict(
        source="photographs" if folder else "synthetic: random clouds, from a seed", images=len(files),
        mean_megapixels=float(np.mean([image.width * image.height for image in images])) / 1e6,
        kilobytes=dict(JPEG=float(np.mean([len(content) for content in written])) / 1e3),
        originals=dict(JPEG=sum(is_jpeg)),
    )


def _decode(content: bytes) -> Image.Image:
    return load_image(io.BytesIO(content))


def _encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def recipe_defaults() -> tuple[dict, str]:
    """The default recipe's training transform without RandAugment, and RandAugment's policy."""
    recipe = AugmentationOptions()
    settings = dict(scale=tuple(recipe.scale), ratio=tuple(recipe.ratio), hflip=recipe.hflip,
                    interpolation=recipe.train_interpolation)
    return settings, recipe.aa


def transforms() -> dict[str, Callable[[Image.Image], torch.Tensor]]:
    """Transforms at 224 by the names of their rows; those of training are the default recipe's."""
    settings, policy = recipe_defaults()
    common = dict(input_size=SIDE, **NORMALISATION)
    return {
        "decode + evaluation transform": build_transform(train=False, **common),
        f"{TRAIN} without {policy}": build_transform(train=True, color_jitter=None, **settings, **common),
        TRAIN: build_transform(train=True, auto_augment=policy, **settings, **common),
    }


def training_batches(dataset: ImageDataset, workers: int) -> Iterable:
    """The batches of an epoch, as uint8: normalising them is the GPU's work, and would count on the CPU."""
    options = LoaderOptions(batch_size=BATCH, num_workers=workers)
    return build_loader(dataset, options, Distributed(torch.device("cpu")), train=True, collate_fn=fast_collate).loader


def decode_all(files: list[bytes]):
    for content in files:
        _decode(content)


def read_all(dataset: ImageDataset):
    with seeded(0):  # the same crops and operations in each round
        for index in range(len(dataset)):
            dataset[index]


def load_all(batches: Iterable):
    for _ in batches:
        pass


def seed_all(count: int):
    """What the loader adds to each image: deriving its seed and seeding the generators of a worker."""
    for index in range(count):
        seed_generators(derive_seed(0, 0, index), torch.default_generator.manual_seed)


def measure(files: list[bytes], trial: Trial) -> list[dict]:
    """Rows of images per second: decoding, then with transforms, then by the loader; and seeding.

    The `ratio` of a row is to decoding alone; its `workers` are the processes that share its work.
    """
    runs, rows = {}, []

    def add(kind: str, name: str, run: Callable[[], None], images: int, workers: int = 1):
        contender = f"{kind}, {name}, JPEG"
        runs[contender] = run
        rows.append(dict(kind=kind, name=name, format="JPEG", contender=contender, images=images, workers=workers))

    add("decode", "PIL", partial(decode_all, files), len(files))
    for name, transform in transforms().items():
        dataset = ImageDataset(InMemory(files), transform=transform)
        add("pipeline", name, partial(read_all, dataset), len(files))
    for workers in dict.fromkeys((1, machine(trial.device)["cores"])):
        share = workers * BATCH  # a pass is at least all images, in equally many whole batches for each worker
        images = share * max(BATCHES_PER_WORKER, math.ceil(len(files) / share))
        source = InMemory(files[index % len(files)] for index in range(images))
        batches = training_batches(ImageDataset(source, transform=transforms()[TRAIN]), workers)
        name = f"the loader, training, {workers} worker{'s' if workers > 1 else ''}"
        add("pipeline", name, partial(load_all, batches), images, workers)
    add("pipeline", "seeding alone", partial(seed_all, SEEDINGS * len(files)), SEEDINGS * len(files))

    seconds = interleave(runs, trial)
    for row in rows:
        if row["contender"] in trial.failures:
            row.update(failed=trial.failures[row["contender"]])
            continue
        reference = seconds.get("decode, PIL, JPEG")
        if reference is not None:
            reference = [s * row["images"] / len(files) for s in reference]  # for as many images
        row.update(summarize(seconds[row["contender"]], reference, row["images"]))
    return rows


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
