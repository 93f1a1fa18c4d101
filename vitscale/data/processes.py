"""Loader processes: how they start, what signals mean to them, and how they end with their trainer.

They are forked from a clean server process, never from the trainer, whose device is in use. Launchers and Slurm
signal every process of a job, but the trainer alone decides what a signal means: the workers are started with
these signals blocked.
"""

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Generator, Iterator
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vitscale.errors import STOP_SIGNALS, ShardError

T = TypeVar("T")

CLOSE_TIMEOUT_S = 10.0


class Recipe(Protocol):
    """What workers do: each makes its part of every batch."""

    def parts(self, worker: int, workers: int) -> Iterator[Any]:
        """Parts of the batches, one a batch, in their order."""
        ...


class Background(Generic[T]):
    """An iterator that a thread runs ahead of its user; without `threaded`, the iterator itself."""

    def __init__(self, items: Generator[T, None, None], depth: int, threaded: bool) -> None:
        """Begin at once; at most `depth` items wait."""
        self._items = items
        self._closing = threading.Event()
        self._queue: queue.Queue[T | BaseException] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    @property
    def ready(self) -> int:
        """Items that wait for the user."""
        return self._queue.qsize()

    def __next__(self) -> T:
        """The next item; an error of the iterator is raised here."""
        if self._thread is None:
            return next(self._items)
        if self._closing.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._closing.set()
            try:
                raise item
            finally:
                del item  # it would hold this frame, which would hold it
        return item

    def close(self) -> None:
        """End the thread and the iterator."""
        self._closing.set()
        if self._thread is not None:
            with contextlib.suppress(queue.Empty):  # room for what the thread holds
                while True:
                    self._queue.get_nowait()
            self._thread.join(CLOSE_TIMEOUT_S)
            if self._thread.is_alive():  # it waits for a worker; both end with the process
                return
        self._items.close()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._closing.is_set():
                    return
            self._queue.put(StopIteration())
        except BaseException as error:
            self._queue.put(error)


class _Worker(IterableDataset[Any]):
    """One worker's parts. A ShardError is handed over, not raised: DataLoader would wrap it into a long traceback."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            yield from self._recipe.parts(*((info.id, info.num_workers) if info else (0, 1)))
        except ShardError as error:
            yield error


class Parts:
    """Parts from the workers in turn: part i comes from worker i mod `workers`.

    Args:
        recipe: how parts are made.
        workers: processes; 0 makes all parts in this one.
        prefetch: parts that each worker holds ready.
    """

    def __init__(self, recipe: Recipe, workers: int, prefetch: int) -> None:
        """Start the workers."""
        loader = DataLoader(
            _Worker(recipe),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_end_with_the_trainer,
            generator=torch.Generator(),  # else DataLoader draws a seed from the generator that dropout uses
        )
        if workers:
            start_server()
        with _signals_blocked():
            self._parts: Iterator[Any] = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        """Parts are their own iterator."""
        return self

    def __next__(self) -> Any:
        """The next part."""
        return next(self._parts)

    def close(self) -> None:
        """End the workers now. Left to the garbage collector, a traceback that holds them makes that take seconds."""
        self._parts = iter(())


def start_server() -> None:
    """Start the process that workers are forked from, which takes the seconds of its imports, if it does not run."""
    multiprocessing.set_forkserver_preload(["vitscale.data.loader"])
    with _signals_blocked():
        forkserver.ensure_running()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals that ask for an end; a process that is started meanwhile inherits that."""
    resource_tracker.ensure_running()  # its start would unblock the signals again
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _end_with_the_trainer(worker: int) -> None:
    """Watch the trainer from a thread of the worker.

    DataLoader's own watch looks at the parent process, which is the fork server here, and the server lives as
    long as its workers do.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        connection.wait([trainer.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register
def _end_left_workers() -> None:
    """At the trainer's exit multiprocessing ends daemonic children by SIGTERM, which the workers block."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _as_is(part: Any) -> Any:
    return part
