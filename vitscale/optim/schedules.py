"""Learning-rate schedules: pure functions of the step."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    kind: Literal["cosine", "linear", "rsqrt", "constant"],
    peak_lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    timescale_steps: float | None = None,
    final_lr: float = 0.0,
) -> float:
    """The rate that update number `step` uses, counted from 0 to total_steps - 1.

    The warm-up is the line from 0 just before the run (step -1) to the peak at step `warmup_steps`; cosine and linear
    go from the peak there to `final_lr` just after the run (step `total_steps`). Both ends thus lie outside
    the run, so that no update is spent on a rate of 0. rsqrt is peak_lr / sqrt(1 + t / timescale_steps), t steps after
    the warm-up (Zhai et al. 2022, section 3.5): it knows no end, so a cool-down can begin at any of its checkpoints.
    rsqrt and constant are multiplied by the line from 1 to 0 over the last `cooldown_steps`, which too reaches 0 just
    after the run.

    This is big_vision's curve of total_steps + 1 steps with a warm-up of warmup_steps + 1, without its first step,
    whose rate is 0.
    """
    assert 0 <= step < total_steps
    assert 0 <= warmup_steps < total_steps
    if step < warmup_steps:
        return peak_lr * (step + 1) / (warmup_steps + 1)
    since = step - warmup_steps
    progress = since / (total_steps - warmup_steps)
    cooling = min(1.0, (total_steps - step) / cooldown_steps) if cooldown_steps else 1.0
    match kind:
        case "constant":
            return peak_lr * cooling
        case "rsqrt":
            assert timescale_steps is not None  # the config asks for it
            return peak_lr / math.sqrt(1 + since / timescale_steps) * cooling
        case "linear":
            left = 1 - progress
        case "cosine":
            left = (1 + math.cos(math.pi * progress)) / 2
    return peak_lr * left + final_lr * (1 - left)
