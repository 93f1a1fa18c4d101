"""Doing on rank 0 what only one may do, so that every rank learns how it went."""

from collections.abc import Callable
from typing import TypeVar

from vitscale.errors import VitscaleError
from vitscale.ranks import Ranks

T = TypeVar("T")


def on_main(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give its result, or its `VitscaleError`, to every rank. Collective."""
    result: T | None = None
    error: VitscaleError | None = None
    if ranks.is_main:
        try:
            result = action()
        except VitscaleError as raised:
            error = raised
    result, error = ranks.broadcast_object((result, error))
    if error is not None:
        raise as_one(ranks, error)
    return result  # type: ignore[return-value]


def as_one(ranks: Ranks, error: VitscaleError) -> VitscaleError:
    """Mark an error that every rank is about to raise, so that only rank 0 tells it."""
    error.told = not ranks.is_main
    return error
