"""Uploads to the mirror that neither training nor the next save waits for."""

import logging
import queue
import threading

from vitscale.checkpoint.mirror import Mirror
from vitscale.checkpoint.mirroring import update_mirror
from vitscale.checkpoint.store import CheckpointStore
from vitscale.config import CheckpointSection

log = logging.getLogger(__name__)


class Uploads:
    """Brings a mirror up to date, in a thread of its own, after every commit that it can keep up with."""

    def __init__(self, mirror: Mirror, store: CheckpointStore, keep: CheckpointSection) -> None:
        """Start the thread; it waits for tags."""
        self._mirror, self._store, self._keep = mirror, store, keep
        self._tags: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def push(self, tag: str) -> None:
        """A tag was committed; it is uploaded unless a newer one comes first."""
        self._tags.put(tag)

    def close(self, timeout_s: float) -> None:
        """Upload what was pushed, but take no longer than this; what is missing then is uploaded by the next start."""
        self._tags.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning(
                "the mirror is not up to date: its upload took over %g s and is left to the next start", timeout_s
            )

    def _run(self) -> None:
        closing = False
        while not closing:
            pushed = [self._tags.get()]
            while not self._tags.empty():
                pushed.append(self._tags.get())
            closing = None in pushed
            tags = [tag for tag in pushed if tag is not None]
            if tags:
                update_mirror(self._mirror, self._store, self._keep, tags[-1])
