"""Doing on rank 0 what only one may do, so that every rank learns how it went."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from vitscale.checkpoint import BackgroundTask
from vitscale.errors import VitscaleError
from vitscale.ranks.groups import Ranks

T = TypeVar("T")

_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.005, 0.2


def on_main(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give its result, or its `VitscaleError`, to every rank. Collective.

    It may take longer than a collective may last, such as to read a checkpoint from far away.
    """
    results: list[T] = []
    error: VitscaleError | None = None
    task = BackgroundTask("rank 0 alone")
    if ranks.is_main:
        task.start(lambda: results.append(action()))
    wait_while(ranks, lambda: task.running)
    if ranks.is_main:
        try:
            task.wait()
        except VitscaleError as raised:
            error = raised
    results, error = ranks.broadcast_object((results, error))
    if error is not None:
        raise as_one(ranks, error)
    return results[0]


def wait_while(ranks: Ranks, busy: Callable[[], bool]) -> None:
    """Wait until no rank is busy, asking again and again: this outlasts the limit of any one collective. Collective."""
    wait_s = _FIRST_LOOK_S
    while ranks.any(busy()):
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_LOOK_S)


def raise_first(ranks: Ranks, faults: Sequence[VitscaleError | None]) -> None:
    """Raise the first fault there is as one of all ranks, each of which gives the same faults."""
    if fault := next(filter(None, faults), None):
        raise as_one(ranks, fault)


def as_one(ranks: Ranks, error: VitscaleError) -> VitscaleError:
    """Mark an error that every rank is about to raise, so that only rank 0 tells it."""
    error.told = not ranks.is_main
    return error
