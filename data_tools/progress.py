"""How far long work has come: a bar on a terminal, plain lines in a log, both on stderr."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_EVERY_S = 30.0


def progress(results: Iterable[T], total: int, unit: str, amount: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """Pass the results on and tell how far they are, how fast they come and how long the rest will take.

    Args:
        results: what is waited for.
        total: sum of all amounts.
        unit: what is counted, in the singular.
        amount: how much of the total one result is.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, unit=unit, unit_scale=True, smoothing=0.05) as bar:
            for result in results:
                bar.update(amount(result))
                yield result
        return
    started = told = time.monotonic()
    done = 0
    for result in results:
        done += amount(result)
        now = time.monotonic()
        if now - told >= LINE_EVERY_S:
            rate = done / (now - started)
            left = f"{(total - done) / rate:.0f} s left" if rate else "nothing done yet"
            sys.stderr.write(f"{done}/{total} {unit}s, {rate:.1f}/s, {left}\n")
            told = now
        yield result
