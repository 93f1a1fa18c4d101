"""Where metrics go: metrics.jsonl and the console; TensorBoard's sink is in `board`. Only rank 0 has sinks."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from vitscale.telemetry import tags

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the metrics of a step, by tag. Any method may raise OSError."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the metrics of a step."""

    def images(self, step: int, tag: str, png: bytes) -> None:
        """Record a picture of a step, as a PNG file; a sink without a place for pictures does nothing."""

    def flush(self) -> None:
        """Hand over to the operating system what is pending."""

    def close(self) -> None:
        """Flush and let go."""


class MetricWriter:
    """Hands metrics to every sink. A sink that fails with an OSError is dropped with one warning."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        """Take the sinks over; `close` closes them."""
        self._sinks = list(sinks)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the metrics of a step in every sink."""
        self._each(lambda sink: sink.write(step, scalars))

    def images(self, step: int, tag: str, png: bytes) -> None:
        """Record a picture of a step in every sink that has a place for it."""
        self._each(lambda sink: sink.images(step, tag, png))

    def flush(self) -> None:
        """Flush every sink."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except OSError as error:
                self._sinks.remove(sink)
                log.warning("%s failed, the run goes on without it: %s", type(sink).__name__, error)


class JsonlSink:
    """One JSON object a line: {"step": step, "time": seconds since the epoch, tag: value, ...}.

    A value that is not finite is null, because JSON has no other word for it.
    """

    def __init__(self, path: Path) -> None:
        """Open the file to append to."""
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line at a time

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append a line."""
        values = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def images(self, step: int, tag: str, png: bytes) -> None:
        """See `Sink`: nothing."""

    def flush(self) -> None:
        """See `Sink`."""
        self._file.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()


# What the console shows of a record, in this order.
_CONSOLE_FORMATS = {
    tags.TRAIN_LOSS: "loss {:.4f}",
    tags.TRAIN_LR: "lr {:.1e}",
    tags.PERF_IMAGES_PER_S: "images/s {:.0f}",
    tags.PERF_MFU: "mfu {:.1%}",
    tags.VAL_LOSS: "val loss {:.4f}",
    tags.VAL_TOP1: "val top1 {:.1%}",
    tags.VAL_TOP5: "val top5 {:.1%}",
    tags.VAL_AVERAGE_TOP1: "average's top1 {:.1%}",
}


class ConsoleSink:
    """On a terminal a progress bar on standard error, elsewhere a line of the log for each record."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        """Start the bar, and the clock of the estimated time to the end, at `start_step`."""
        self._total_steps = total_steps
        self._start_step = start_step
        self._started_s = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show a record: training metrics beside the bar, all others on a line of their own."""
        shown = "  ".join(form.format(scalars[tag]) for tag, form in _CONSOLE_FORMATS.items() if tag in scalars)
        if self._bar.disable:
            log.info("step %d/%d  %s%s", step, self._total_steps, shown, self._remaining(step))
        elif tags.TRAIN_LOSS in scalars:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._bar.write(f"step {step}/{self._total_steps}  {shown}", file=sys.stderr)

    def images(self, step: int, tag: str, png: bytes) -> None:
        """See `Sink`: nothing."""

    def flush(self) -> None:
        """See `Sink`."""
        sys.stderr.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._bar.close()

    def _remaining(self, step: int) -> str:
        if not self._start_step < step < self._total_steps:
            return ""
        step_time_s = (time.monotonic() - self._started_s) / (step - self._start_step)
        return f"  eta {format_duration((self._total_steps - step) * step_time_s)}"


def format_duration(duration_s: float) -> str:
    """A length of time to two units, rounded down: 42s, 3m05s, 2h07m, 5d03h."""
    seconds = int(duration_s)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
