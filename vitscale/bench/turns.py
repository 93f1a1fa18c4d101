"""Contenders timed in turn, round by round, so that a drift of the machine's speed hits all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_RESAMPLES = 10_000


class Seconds(NamedTuple):
    """Of one turn: by the clock, and of all the process's threads."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """Two contenders round by round: the median quotient of their times with its 95 % interval, and by CPU time."""

    median: float
    low: float
    high: float
    by_cpu: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup_rounds: int = 2,
    between: Callable[[], object] = lambda: None,
) -> dict[str, list[Seconds]]:
    """Times of each contender in each counted round; the order is turned round from one round to the next.

    What `between` does after each turn is not counted.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for number in range(warmup_rounds + rounds):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            gc.collect()  # of what others left behind
            taken = timed(contenders[name])
            between()
            if number >= warmup_rounds:
                found[name].append(taken)
    return found


def timed(call: Callable[[], object]) -> Seconds:
    """What one call takes."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def ratio(ours: Sequence[Seconds], theirs: Sequence[Seconds]) -> Ratio:
    """Ours over theirs, the interval by bootstrap (Efron 1979) over the rounds."""
    quotients = np.array([a.wall / b.wall for a, b in zip(ours, theirs, strict=True)])
    drawn = np.random.default_rng(0).choice(quotients, (_RESAMPLES, len(quotients)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    by_cpu = statistics.median(a.cpu / b.cpu for a, b in zip(ours, theirs, strict=True))
    return Ratio(float(np.median(quotients)), float(low), float(high), by_cpu)


def median_ms(times: Sequence[Seconds]) -> float:
    """By the clock."""
    return statistics.median(taken.wall for taken in times) * 1e3
