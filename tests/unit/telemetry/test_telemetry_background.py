import threading

import pytest

from vitscale.telemetry import BackgroundSink, JsonlSink, MetricWriter


class Recorder:
    """Keeps what it gets, and in which thread; holds every record until it is let go."""

    def __init__(self):
        self.calls = []
        self.threads = {threading.get_ident()}
        self.go = threading.Event()
        self.go.set()

    def _keep(self, *call):
        assert self.go.wait(10)
        self.threads.add(threading.get_ident())
        self.calls.append(call)

    def write(self, step, scalars):
        self._keep(step, scalars)

    def images(self, step, tag, png):
        self._keep(step, tag, png)

    def flush(self):
        self._keep("flush")

    def close(self):
        self._keep("close")


def opened_by(sink, **options):
    """A background sink over `sink`, once its thread has opened it."""
    ready = threading.Event()

    def open_sink():
        ready.set()
        return sink

    background = BackgroundSink(open_sink, **options)
    assert ready.wait(10)
    return background


def test_records_are_passed_on_in_order_from_another_thread():
    sink = Recorder()
    background = opened_by(sink)
    scalars = {"train/loss": 1.0}
    background.write(1, scalars)
    scalars["train/loss"] = 2.0  # the caller's to change
    background.images(1, "pictures/a", b"png")
    background.flush()
    background.write(2, scalars)
    background.close()
    assert sink.calls == [(1, {"train/loss": 1.0}), (1, "pictures/a", b"png"), (2, {"train/loss": 2.0}), ("close",)]
    assert threading.get_ident() not in sink.threads - {threading.get_ident()}
    assert len(sink.threads) == 2


def test_a_service_that_hangs_holds_up_nobody():
    sink = Recorder()
    sink.go.clear()
    background = opened_by(sink, limit=2, close_timeout_s=0.05)
    background.write(1, {})
    while not background._waiting.empty():  # until the thread has taken it
        pass
    background.write(2, {})
    background.write(3, {})
    with pytest.raises(OSError, match="2 records wait for it: it cannot keep up"):
        background.write(4, {})
    sink.go.set()


def test_the_last_records_are_waited_for_a_limited_time():
    sink = Recorder()
    sink.go.clear()
    background = opened_by(sink, close_timeout_s=0.05)
    background.write(1, {})
    with pytest.raises(OSError, match="not taken within 0 s"):
        background.close()
    sink.go.set()


class GoneError(Exception):
    """What no caller expects."""


def fail(*_):
    raise GoneError("no such host")


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_failure_is_one_warning_and_the_other_sinks_go_on(tmp_path, caplog, when):
    sink = Recorder()
    if when != "open":
        setattr(sink, when, fail)
    background = BackgroundSink(fail if when == "open" else lambda: sink)
    writer = MetricWriter([background, JsonlSink(tmp_path / "metrics.jsonl")])
    if when != "close":
        writer.write(1, {"train/loss": 1.0})
        background._thread.join(10)
    writer.write(2, {"train/loss": 1.0})
    writer.write(3, {"train/loss": 1.0})
    writer.close()
    (warning,) = caplog.messages
    assert warning == "BackgroundSink failed, the run goes on without it: GoneError: no such host"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == (2 if when == "close" else 3)
