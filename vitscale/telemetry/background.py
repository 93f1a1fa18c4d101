"""A sink that works in a thread of its own, for services that may be slow, far or gone."""

import queue
import threading
from collections.abc import Callable, Mapping

from vitscale.telemetry.sinks import Sink

_WAITING_RECORDS = 1000
_CLOSE_TIMEOUT_S = 30.0


class BackgroundSink:
    """Passes records on to a sink that its thread opens, so that no step waits for it.

    Whatever goes wrong there comes out as an OSError of the next call, after which the sink takes nothing more.
    """

    def __init__(
        self, open_sink: Callable[[], Sink], *, limit: int = _WAITING_RECORDS, close_timeout_s: float = _CLOSE_TIMEOUT_S
    ) -> None:
        """Start the thread.

        Args:
            open_sink: called in the thread.
            limit: records that may wait; one more is an OSError.
            close_timeout_s: how long `close` waits for them.
        """
        self._open_sink = open_sink
        self._waiting: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(limit)
        self._close_timeout_s = close_timeout_s
        self._failure: Exception | None = None
        # A daemon: a service that hangs must not keep the run from ending.
        self._thread = threading.Thread(target=self._work, name="second sink", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Sink`."""
        kept = dict(scalars)
        self._put(lambda sink: sink.write(step, kept))

    def images(self, step: int, tag: str, png: bytes) -> None:
        """See `Sink`."""
        self._put(lambda sink: sink.images(step, tag, png))

    def flush(self) -> None:
        """See `Sink`: nothing, because it would wait for the service."""
        self._check()

    def close(self) -> None:
        """Wait, for a limited time, until everything is passed on."""
        self._check()
        self._put(None)
        self._thread.join(self._close_timeout_s)
        self._check()
        if self._thread.is_alive():
            raise OSError(f"its last records were not taken within {self._close_timeout_s:.0f} s")

    def _put(self, action: Callable[[Sink], None] | None) -> None:
        self._check()
        try:
            self._waiting.put_nowait(action)
        except queue.Full:
            raise OSError(f"{self._waiting.maxsize} records wait for it: it cannot keep up") from None

    def _check(self) -> None:
        if self._failure is not None:
            raise OSError(f"{type(self._failure).__name__}: {self._failure}") from self._failure

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            while (action := self._waiting.get()) is not None:
                action(sink)
            sink.close()
        except Exception as error:  # whatever a client library may raise
            self._failure = error
