import gzip
import json

import pytest
import torch
from pydantic import ValidationError

from vitscale.config import ProfileSection
from vitscale.ranks.groups import Ranks
from vitscale.train.profiling import StepProfiler


def run(tmp_path, first, last, rank=0, **section):
    """Steps `first` to `last`, each one multiplication of its own size under the profiler."""
    ranks = Ranks(rank, 2, 0, 1, torch.device("cpu"))
    profiler = StepProfiler(ProfileSection(**section), ranks, tmp_path)
    for step in range(first, last + 1):
        profiler.before(step)
        torch.ones(step, 7) @ torch.ones(7, 3)
        profiler.after(step)
    profiler.close()
    return sorted(path.name for path in tmp_path.glob("profile/*"))


def multiplied(tmp_path, name):
    """The sizes of the multiplications in a trace."""
    trace = json.loads(gzip.decompress((tmp_path / "profile" / name).read_bytes()))
    events = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    return [event["args"]["Input Dims"][0][0] for event in events]


@pytest.mark.parametrize("steps", ["10..12", [10, 12], " 10..12 "])
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, steps):
    assert run(tmp_path, 1, 20, steps=steps) == ["trace-rank0-step10-12.json.gz"]
    assert multiplied(tmp_path, "trace-rank0-step10-12.json.gz") == [10, 11, 12]


@pytest.mark.parametrize(
    ("first", "last", "traced"),
    [
        pytest.param(1, 9, [1, 2, 3], id="from the first step on, which has none before it"),
        pytest.param(2, 9, [2, 3], id="resumed in the middle"),
        pytest.param(1, 2, [1, 2], id="stopped in the middle"),
    ],
)
def test_a_trace_of_the_steps_there_are(tmp_path, first, last, traced):
    assert run(tmp_path, first, last, steps=(1, 3)) == ["trace-rank0-step1-3.json.gz"]
    assert multiplied(tmp_path, "trace-rank0-step1-3.json.gz") == traced


@pytest.mark.parametrize(
    ("rank", "section", "first"),
    [
        pytest.param(0, {}, 1, id="not asked for"),
        pytest.param(1, {"steps": (2, 3)}, 1, id="another rank"),
        pytest.param(0, {"steps": (2, 3)}, 4, id="resumed after it"),
        pytest.param(0, {"steps": (30, 40)}, 1, id="the run ends before it"),
    ],
)
def test_without_a_step_to_trace_nothing_is_started(tmp_path, monkeypatch, rank, section, first):
    monkeypatch.setattr("vitscale.train.profiling.profile", None)
    assert run(tmp_path, first, 9, rank=rank, **section) == []


def test_other_ranks_write_their_own(tmp_path):
    assert run(tmp_path, 1, 4, rank=1, steps=(2, 3), ranks=(0, 1)) == ["trace-rank1-step2-3.json.gz"]


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    assert run(tmp_path, 1, 9, steps=(2, 3)) == []
    (warning,) = caplog.messages
    assert "trace-rank0-step2-3.json.gz: the trace cannot be written, the run goes on: " in warning


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"steps": "10-12"}, "'10-12' is no range of steps: write FIRST..LAST, such as 10..12"),
        ({"steps": "12..10"}, "profile.steps 12..10 ends before it begins: swap the two"),
        ({"steps": "0..2"}, "greater than or equal to 1"),
        ({"steps": (2, 3), "ranks": ()}, "at least 1 item"),
    ],
)
def test_ranges_that_cannot_be_are_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        ProfileSection(**section)
