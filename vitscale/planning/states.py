"""Bytes of weights, gradients and optimizer state on one rank under ZeRO (Rajbhandari et al. 2020, table 1)."""

from dataclasses import dataclass

from vitscale.engine import Precision

MASTER_BYTES = MOMENT_BYTES = 4
MOMENTS = 2


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank; activations, buckets and the allocator's waste come on top."""

    weights: float
    gradients: float
    optimizer: float
    """fp32 master weights, where they are a copy, and both of Adam's moments."""

    @property
    def total(self) -> float:
        """Sum of the three."""
        return self.weights + self.gradients + self.optimizer


def state_bytes(parameters: int, *, world_size: int, zero_stage: int, precision: Precision) -> StateBytes:
    """State of a model of `parameters` elements trained with AdamW.

    Stage 1 divides the optimizer state by the ranks, stage 2 the gradients as well, stage 3 the weights too.
    DeepSpeed keeps a master copy under ZeRO even in fp32; without ZeRO (stage 0, fp32 only) there is none.
    """
    element = 2 if precision == "bf16" else 4
    copy = MASTER_BYTES if zero_stage > 0 else 0
    return StateBytes(
        weights=parameters * element / (world_size if zero_stage == 3 else 1),
        gradients=parameters * element / (world_size if zero_stage >= 2 else 1),
        optimizer=parameters * (copy + MOMENTS * MOMENT_BYTES) / (world_size if zero_stage >= 1 else 1),
    )
