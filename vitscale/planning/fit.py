"""Whether a run fits the memory of its GPUs, and the largest micro-batch that would."""

from vitscale.model import Variant
from vitscale.planning.activations import ActivationRule, activation_bytes
from vitscale.planning.states import StateBytes

_LARGEST_MICRO_BATCH = 1 << 16


def step_bytes(variant: Variant, micro_batch: int, rule: ActivationRule, state: StateBytes) -> int:
    """The most that tensors take on one rank within a step: `StateBytes.peak` of `ActivationBytes.peak`."""
    return state.peak(activation_bytes(variant, micro_batch, rule).peak)


def largest_micro_batch(variant: Variant, rule: ActivationRule, state: StateBytes, limit_bytes: float) -> int:
    """The largest even micro-batch whose step stays within `limit_bytes`; 0 where not even 2 images do.

    Activations grow with the micro-batch, so halving the range finds it.
    """
    fits, too_many = 0, _LARGEST_MICRO_BATCH // 2
    while too_many - fits > 1:
        pairs = (fits + too_many) // 2
        if step_bytes(variant, 2 * pairs, rule, state) <= limit_bytes:
            fits = pairs
        else:
            too_many = pairs
    return 2 * fits


def largest_dividing(micro_batch: int, rank_batch: int) -> int:
    """The largest even micro-batch, `micro_batch` at most, that divides a rank's images of a step; 0 for none."""
    return next((m for m in range(micro_batch // 2 * 2, 0, -2) if rank_batch % m == 0), 0)
