"""How the ranks of a preflight wait for each other: in the store that rank 0 keeps, and never for ever."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, and not re-exported
from torch.distributed.distributed_c10d import Store

from vitscale.train.preflight.seat import Limits, Seat

Roster = Mapping[str, Sequence[int]]
"""The ranks of each node that takes part, in the order of the nodes' first ranks."""

_LOOK_S = 0.1


def store_at(seat: Seat, host: str, port: int, limits: Limits) -> Store:
    """The store on rank 0, where it begins to be, and the way to it on the others.

    Raises:
        RuntimeError: the port is taken, or nobody is there in time.
    """
    timeout = timedelta(seconds=limits.coming_s)
    return TCPStore(host, port, is_master=seat.rank == 0, timeout=timeout, wait_for_workers=False)


def arrive(store: Store, name: str) -> None:
    """Say that this rank has come to a gate."""
    store.add(name, 1)


def arrivals(store: Store, name: str, expected: int, limit_s: float) -> int:
    """How many have come to a gate once all that are expected have, or after so long."""
    deadline_s = time.monotonic() + limit_s
    while (came := store.add(name, 0)) < expected and time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)
    return came


def pass_gate(store: Store, name: str, expected: int, limit_s: float, *, leads: bool) -> int:
    """Go on together, though some may never come: one rank waits for the others, and opens the gate for all.

    Returns:
        How many to expect at the next gate: who did not come here is not waited for again. For the rank that leads.
    """
    arrive(store, name)
    if leads:
        expected = min(arrivals(store, name, expected, limit_s), expected)
        store.set(f"{name}/open", "")
    else:
        with contextlib.suppress(RuntimeError):  # the leader is gone: each for itself
            store.wait([f"{name}/open"], timedelta(seconds=2 * limit_s))
    return expected


def all_come(store: Store, name: str, expected: int, limit_s: float) -> bool:
    """Whether all that are expected come to a gate in time: the last of them opens it."""
    if store.add(name, 1) == expected:
        store.set(f"{name}/open", "")
    try:
        store.wait([f"{name}/open"], timedelta(seconds=limit_s))
    except RuntimeError:
        return False
    return True


def await_roster(store: Store, key: str, limit_s: float) -> Roster:
    """The roster that one rank puts there for all; raises a RuntimeError where it does not in time."""
    store.wait([key], timedelta(seconds=limit_s))
    roster: Roster = json.loads(store.get(key))
    return roster


def there(store: Store, kind: str, world_size: int) -> Iterator[str]:
    """What the ranks put into the store, of those that did."""
    for key in (f"{kind}/{rank}" for rank in range(world_size)):
        if store.check([key]):
            yield store.get(key).decode()
