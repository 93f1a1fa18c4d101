"""Learning-rate schedules: pure functions of the step."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    kind: Literal["cosine", "linear", "constant"],
    peak_lr: float,
    total_steps: int,
    warmup_steps: int,
    final_lr: float,
) -> float:
    """The rate that update number `step` uses, counted from 0 to total_steps - 1.

    The warm-up is the line from 0 just before the run (step -1) to the peak at step `warmup_steps`; the decay
    goes from the peak there to `final_lr` just after the run (step `total_steps`). Both ends thus lie outside
    the run, so that no update is spent on a rate of 0: the first uses peak_lr / (warmup_steps + 1), the last
    is one step short of `final_lr`. A constant schedule stays at the peak and has no use for `final_lr`.
    """
    assert 0 <= step < total_steps
    assert 0 <= warmup_steps < total_steps
    if step < warmup_steps:
        return peak_lr * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return peak_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    left = 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak_lr * left + final_lr * (1 - left)
