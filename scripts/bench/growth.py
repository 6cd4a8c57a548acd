"""What an image costs as images grow: time and memory of one image, at sides that are multiples of 224."""
from collections.abc import Callable
from dataclasses import dataclass, replace

from .networks import Contender, Setting, build
from .timing import interleave, peak_memory, summarize, warm
from .trial import Trial, is_out_of_memory, release

FINEST_AT_224 = 7


@dataclass(frozen=True)
class Size:
    """Models at one image side. `setting.batch` is the most to try: it is halved until a model fits."""
    contenders: tuple[Contender, ...]
    reference: str
    setting: Setting


def contenders_at(side: int) -> tuple[Contender, ...]:
    """Fixed regions, regions that grow with the image, windows, and dense attention."""
    growing = (("num_regions", FINEST_AT_224 * side // 224),)
    return (
        Contender("biformer_tiny", label="biformer_tiny, 7 x 7 regions"),
        Contender("biformer_tiny", growing, label="biformer_tiny, regions of a fixed size"),
        Contender("swin_tiny_patch4_window7_224"),
        Contender("deit_small_patch16_224"),
    )


def fit(contender: Contender, setting: Setting, trial: Trial) -> tuple[Callable, Setting]:
    """A warm contender at the largest batch that it has the memory for: `setting.batch`, or halves of it.

    Raises:
        Exception: What the contender raises; being out of memory for one image is among it.
    """
    while True:
        try:
            run, _ = build(contender, setting, trial.device)
            warm(run, trial.device)
            return run, setting
        except Exception as error:
            if not is_out_of_memory(error) or setting.batch == 1:
                raise
        # Outside of the handler: until there, the traceback holds the tensors that filled the memory.
        run = None
        release(trial.device)
        setting = replace(setting, batch=setting.batch // 2)


def measure(size: Size, trial: Trial) -> list[dict]:
    """One row for each model: milliseconds and MiB of one image, and the batch that they were measured with."""
    runs, settings, memory = {}, {}, {}
    for contender in size.contenders:
        name = contender.name
        if name in trial.failures:
            continue
        with trial.guard(name):
            runs[name], settings[name] = fit(contender, size.setting, trial)
            memory[name] = peak_memory(runs[name], trial.device)
    per_image = {
        name: [s / settings[name].batch for s in seconds] for name, seconds in interleave(runs, trial).items()
    }
    rows = []
    for contender in size.contenders:
        name = contender.name
        row = dict(model=name, mode=size.setting.mode, side=size.setting.side)
        if name in per_image:
            row.update(
                batch=settings[name].batch,
                mb_per_image=memory[name] / settings[name].batch,
                **summarize(per_image[name], per_image.get(size.reference), 1),
            )
        else:
            row.update(failed=trial.failures[name])
        rows.append(row)
    return rows
