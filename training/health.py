"""What a run watches in itself while it trains: the loss scale, spikes of the loss, and the slowest process."""
import torch

from .log import NonFiniteLossError
from .precision import INITIAL_SCALE
from .run import Clock

# Twenty halvings below where it starts. There scaling no longer is what overflows: gradients do by themselves.
LEAST_SCALE = INITIAL_SCALE / 2**20


def check_loss_scale(scaler: torch.amp.GradScaler, clock: Clock):
    """Check after a step, which the clock has counted, that gradients in float16 do not overflow at every step.

    GradScaler leaves out a step whose gradients overflow, and halves its scale. All processes have the same gradients,
    and therefore the same scale. Reading it waits for the device, as the scaler itself did just before; without
    float16 nothing is read.

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
