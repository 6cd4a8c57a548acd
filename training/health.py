"""What a run watches in itself while it trains: the loss scale, spikes of the loss, and the slowest process."""
from collections import deque
from collections.abc import Sequence
from statistics import median

import torch

from .distributed import Distributed
from .meter import NonFiniteLossError
from .precision import INITIAL_SCALE
from .run import Clock

# Twenty halvings below where it starts. There scaling no longer is what overflows: gradients do by themselves.
LEAST_SCALE = INITIAL_SCALE / 2**20
WINDOW = 100  # batches


def check_loss_scale(scaler: torch.amp.GradScaler, clock: Clock):
    """Check after a step, which the clock has counted, that gradients in float16 do not overflow at every step.

    GradScaler leaves out a step whose gradients overflow, and halves its scale. All processes have the same gradients,
    and therefore the same scale. Reading it waits for the device: not for every step. Without float16 nothing is read.

    Raises:
        NonFiniteLossError: The scale is below any sensible one, or the run would end without a single step.
    """
    if not scaler.is_enabled():
        return
    scale = scaler.get_scale()
    # Halved as often as there were steps: none was taken, also before the run was stopped and resumed.
    none_taken = clock.is_trained and scale <= INITIAL_SCALE * 0.5**clock.steps_taken
    if scale <= LEAST_SCALE or none_taken:
        raise NonFiniteLossError(
            f"gradients in float16 overflowed {'at every step' if none_taken else 'again and again'}, last in epoch "
            f"{clock.epoch} after step {clock.step}: the loss scale fell to {scale:g}"
        )


class LossWatch:
    """Finds spikes of the loss: more than twice the median of the `WINDOW` losses before it, and above all of them.

    The second keeps a loss that is always noisy, or that stays high, from being told again and again. It remembers
    nothing when a run is resumed, and says nothing before the window is full.
    """

    def __init__(self):
        self.window: deque[float] = deque(maxlen=WINDOW)

    def add(self, losses: Sequence[float]) -> tuple[int, float, float] | None:
        """Take the next losses; of the highest spike among them its place, its loss, and the median before it."""
        found = None
        for place, loss in enumerate(losses):
            if len(self.window) == WINDOW and loss > max(self.window):
                middle = median(self.window)
                if loss > 2 * middle > 0 and (found is None or loss > found[1]):
                    found = place, loss, middle
            self.window.append(loss)
        return found

    def warning(self, losses: Sequence[float], clock: Clock, update_freq: int) -> str | None:
        """Take the losses of the batches before a log line; what to say of a spike among them, in one line."""
        spike = self.add(losses)
        if spike is None:
            return None
        place, loss, middle = spike
        step = clock.step - (len(losses) - 1 - place) // update_freq
        return (
            f"warning: the loss of {loss:.4g} in epoch {clock.epoch} at step {step} is more than twice the median of "
            f"{WINDOW} batches before it, {middle:.4g}"
        )


class OwnTime:
    """Seconds of a batch that a process takes by itself, not waiting for others; of several, which takes most.

    That is loading and the forward pass, up to the first collective operation, as the host sees it: a GPU computes
    behind its host, so that of a slow one nothing is seen here, but of slow storage or a slow host.
    """

    def __init__(self):
        self.seconds, self.batches = 0.0, 0

    def add(self, seconds: float):
        """Count a batch."""
        self.seconds += seconds
        self.batches += 1

    def read(self, distributed: Distributed) -> dict[str, float]:
        """Since the last call, the slowest process's seconds and its number; on all alike, empty where there is one."""
        if not distributed.is_distributed or not self.batches:
            return {}
        own = torch.zeros(distributed.world_size, dtype=torch.float64)
        own[distributed.rank] = self.seconds / self.batches
        self.seconds, self.batches = 0.0, 0
        seconds, process = distributed.sum(own).max(0)
        return dict(slowest_seconds=seconds.item(), slowest_process=process.item())
