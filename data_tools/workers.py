"""Work spread over processes, with results in order and little of it waiting."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WAITING_PER_WORKER = 2


def ordered_map(function: Callable[[T], R], jobs: Iterable[T], workers: int) -> Iterator[R]:
    """Results of `function` over the jobs, in their order, from `workers` processes; 1 is this process.

    Jobs are taken only as fast as they are done, so a long stream of large jobs is never held whole.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_tools.build", "data_tools.verify"])
    # An interrupt is for the command itself: it stops handing out work and ends the workers.
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    pending: deque[Future[R]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > WAITING_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
