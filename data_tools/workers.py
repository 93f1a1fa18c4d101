"""Work spread over processes, with results in order and little of it waiting."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from vitscale.errors import ShardError

T = TypeVar("T")
R = TypeVar("R")

WAITING_PER_WORKER = 2


def ordered_map(function: Callable[[T], R], jobs: Iterable[T], workers: int) -> Iterator[R]:
    """Results of `function` over the jobs, in their order, from `workers` processes; 1 is this process.

    Jobs are taken only as fast as they are done, so a long stream of large jobs is never held whole.

    Raises:
        ShardError: a worker was killed from outside.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_tools.build", "data_tools.verify"])
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    pending: deque[Future[R]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > WAITING_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise ShardError(
            "a worker process was killed, perhaps for want of memory: run it again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    # An interrupt is for the command itself: it stops handing out work and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A command that is killed can end nobody; its workers would wait for work for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
