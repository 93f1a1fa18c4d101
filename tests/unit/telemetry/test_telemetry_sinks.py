import io
import json
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.telemetry import ConsoleSink, JsonlSink, MetricWriter, TensorBoardSink, tags
from vitscale.telemetry.sinks import format_duration


def test_jsonl_holds_a_line_a_record_at_once_and_is_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for steps in ([1, 2], [3]):
        sink = JsonlSink(path)
        for step in steps:
            sink.write(step, {"train/loss": step / 4, "train/lr": 1e-3})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()][-1] == steps[-1]
        sink.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["train/loss"], r["train/lr"]) for r in records] == [
        (1, 0.25, 1e-3),
        (2, 0.5, 1e-3),
        (3, 0.75, 1e-3),
    ]
    assert sorted(r["time"] for r in records) == [r["time"] for r in records]


def test_jsonl_is_strict_json_when_a_value_is_not_finite(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == (None, None, 1.0)


@pytest.mark.fault(35)
def test_an_unwritable_tensorboard_directory_is_told_once_and_the_others_go_on(tmp_path, caplog):
    (tmp_path / "board").write_text("a file where the directory should be")
    writer = MetricWriter([TensorBoardSink(tmp_path / "board"), JsonlSink(tmp_path / "metrics.jsonl")])
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0})
    writer.flush()
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (warning,) = caplog.messages
    assert warning.startswith("TensorBoardSink failed, the run goes on without it: ")
    assert str(tmp_path / "board") in warning


def test_other_errors_of_a_sink_are_not_swallowed(tmp_path):
    writer = MetricWriter([JsonlSink(tmp_path / "metrics.jsonl")])
    with pytest.raises(TypeError):
        writer.write(1, {"train/loss": "no number"})


def test_writer_flushes_and_closes_every_sink(tmp_path):
    class Recorder:
        def __init__(self):
            self.calls = []

        def write(self, step, scalars):
            self.calls.append((step, scalars))

        def images(self, step, tag, png):
            self.calls.append((step, tag, png))

        def flush(self):
            self.calls.append("flush")

        def close(self):
            self.calls.append("close")

    sinks = [Recorder(), Recorder()]
    writer = MetricWriter(sinks)
    writer.write(7, {"val/top1": 0.5})
    writer.images(7, "pictures/a", b"png")
    writer.flush()
    writer.close()
    for sink in sinks:
        assert sink.calls == [(7, {"val/top1": 0.5}), (7, "pictures/a", b"png"), "flush", "close"]


def test_console_adds_a_plain_line_a_record_to_a_log(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = iter([100.0, 120.0])  # the start at step 100, and step 120: one second a step
    monkeypatch.setattr("vitscale.telemetry.sinks.time.monotonic", lambda: next(clock))
    sink = ConsoleSink(total_steps=1000, start_step=100)
    scalars = {tags.TRAIN_LR: 1e-3, tags.TRAIN_LOSS: 2.31, tags.PERF_IMAGES_PER_S: 512.4, tags.TRAIN_GRAD_NORM: 3.0}
    sink.write(120, scalars)
    sink.write(1000, {tags.VAL_LOSS: 1.25, tags.VAL_TOP1: 0.5, tags.VAL_TOP5: 0.875, tags.PERF_MFU: 0.415})
    sink.flush()
    sink.close()
    assert caplog.messages == [
        "step 120/1000  loss 2.3100  lr 1.0e-03  images/s 512  eta 14m40s",
        "step 1000/1000  mfu 41.5%  val loss 1.2500  val top1 50.0%  val top5 87.5%",
    ]


def test_pictures_leave_the_log_and_the_metrics_as_they_are(tmp_path, capsys):
    sinks = [JsonlSink(tmp_path / "metrics.jsonl"), ConsoleSink(total_steps=10, start_step=0)]
    for sink in sinks:
        sink.images(5, "pictures/a", b"png")
        sink.close()
    assert (tmp_path / "metrics.jsonl").read_text() == capsys.readouterr().err == ""


def test_console_shows_a_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    sink = ConsoleSink(total_steps=40, start_step=10)
    sink.write(20, {tags.TRAIN_LOSS: 2.5})
    sink.write(20, {tags.VAL_TOP1: 0.25})
    sink.write(40, {tags.TRAIN_LOSS: 1.5})
    sink.close()
    frames = [frame.rstrip() for frame in terminal.getvalue().replace("\n", "\r").split("\r") if frame.strip()]
    assert " 25%" in frames[0]
    assert "10/40" in frames[0]
    assert "step 20/40  val top1 25.0%" in frames
    assert "40/40" in frames[-1]
    assert "loss 1.5000" in frames[-1]


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (185, "3m05s"),
        (3599, "59m59s"),
        (7620, "2h07m"),
        (86399, "23h59m"),
        (442800, "5d03h"),
    ],
)
def test_durations(duration_s, text):
    assert format_duration(duration_s) == text


@given(st.integers(min_value=0, max_value=10**8))
def test_a_duration_is_the_units_it_shows_rounded_down(seconds):
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    shown, number = 0, ""
    for letter in format_duration(seconds):
        if letter.isdigit():
            number += letter
        else:
            shown, number, last = shown + int(number) * units[letter], "", units[letter]
    assert shown <= seconds < shown + last
