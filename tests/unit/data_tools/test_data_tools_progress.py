"""What long work tells while it goes on."""

import io
import sys
import time

from data_tools.progress import LINE_EVERY_S, progress


class Stderr(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def test_a_log_gets_a_plain_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=False))

    def work():
        for size in (10, 20, 30, 40):
            now[0] += LINE_EVERY_S * 0.6
            yield size

    assert list(progress(work(), 100, "image", lambda size: size)) == [10, 20, 30, 40]
    # At 36 s 30 are done, at 72 s all.
    assert sys.stderr.getvalue().splitlines() == ["30/100 images, 0.8/s, 84 s left", "100/100 images, 1.4/s, 0 s left"]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=True))
    assert list(progress(range(5), 5, "shard")) == [0, 1, 2, 3, 4]
    assert "5.00/5.00" in sys.stderr.getvalue()
    assert "\r" in sys.stderr.getvalue()


def test_work_that_gives_nothing_yet_has_no_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=False))

    def work():
        now[0] += LINE_EVERY_S
        yield 0

    list(progress(work(), 10, "byte", lambda size: size))
    assert sys.stderr.getvalue() == "0/10 bytes, 0.0/s, nothing done yet\n"
