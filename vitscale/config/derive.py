"""Numbers that follow from a config, all computed here and nowhere else."""

import math
from dataclasses import dataclass

from vitscale.config.schedule import BatchSection, ScheduleSection
from vitscale.errors import ConfigError


@dataclass(frozen=True)
class BatchSplit:
    """How a step's images fall on ranks and micro-steps: global_batch = world_size x micro_batch x grad_accum."""

    global_batch: int
    micro_batch: int
    grad_accum: int
    world_size: int

    @property
    def rank_batch(self) -> int:
        """Images one rank sees in a step."""
        return self.micro_batch * self.grad_accum


def split_batch(batch: BatchSection, world_size: int) -> BatchSplit:
    """Split the global batch over `world_size` ranks.

    Raises:
        ConfigError: the global batch is no multiple of ranks x micro-batch; the message names the nearest
            global batches that are, and the micro-batches that fit the global batch as it stands.
    """
    unit = world_size * batch.micro_batch
    if batch.global_batch % unit == 0:
        return BatchSplit(batch.global_batch, batch.micro_batch, batch.global_batch // unit, world_size)
    below, above = batch.global_batch // unit * unit, -(-batch.global_batch // unit) * unit
    nearest = " or ".join(str(b) for b in (below, above) if b)
    per_rank, rest = divmod(batch.global_batch, world_size)
    fitting = [] if rest else [m for m in range(2, per_rank + 1, 2) if per_rank % m == 0]
    by_distance = sorted(fitting, key=lambda m: abs(m - batch.micro_batch))[:2]
    or_micro = f", or batch.micro_batch={' or '.join(map(str, sorted(by_distance)))}" if fitting else ""
    raise ConfigError(
        f"batch.global_batch {batch.global_batch} is not {world_size} ranks x batch.micro_batch "
        f"{batch.micro_batch} x a whole number: use batch.global_batch={nearest}{or_micro}"
    )


def total_steps(schedule: ScheduleSection, global_batch: int, train_samples: int) -> int:
    """Length of the run in optimizer steps; epochs are rounded up to whole steps.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    if schedule.steps is not None:
        steps = schedule.steps
    else:
        assert schedule.epochs is not None  # the schema gives exactly one
        steps = max(1, math.ceil(schedule.epochs * train_samples / global_batch))
    if schedule.warmup_steps >= steps:
        raise ConfigError(
            f"schedule.warmup_steps {schedule.warmup_steps} leaves nothing of the run's {steps} steps: "
            f"use at most {steps - 1}"
        )
    return steps
