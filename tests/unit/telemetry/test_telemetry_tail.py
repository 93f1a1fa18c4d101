"""The newest record of a tag, in files as runs and killed runs leave them."""

import json

import pytest

from vitscale.telemetry.tail import newest_record


def line(step, **values):
    return json.dumps({"step": step, **values}) + "\n"


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_the_newest_value_of_a_long_file_is_found(metrics):
    filling = "x" * 100
    lines = [line(step, a=step / 2, filling=filling) for step in range(2000)]
    metrics.write_text("".join([*lines, line(2000, a=None), line(2001, b=1.0)]))
    assert metrics.stat().st_size > 1 << 17
    assert newest_record(metrics, "a") == {"step": 1999, "a": 999.5, "filling": filling}
    assert newest_record(metrics, "c") is None


def test_a_rare_value_is_found_as_far_back_as_it_may_be_looked_for(metrics):
    metrics.write_text(line(1, rare=3.0) + "".join(line(step, a=0.0, filling="x" * 100) for step in range(2, 8000)))
    assert metrics.stat().st_size > 1 << 20
    assert newest_record(metrics, "rare") is None
    assert newest_record(metrics, "rare", within_bytes=1 << 19) is None
    assert newest_record(metrics, "rare", within_bytes=1 << 24) == {"step": 1, "rare": 3.0}


TORN = ('{"step": 3, "a"', '{"step": 3, "a": 1.', 'p": 3, "a": 1.0}', '[3, "a"]\n', '"a"\n', '{"a": 1.0}\n', '\0\0"a"')


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_line_is_passed_over(metrics, torn):
    metrics.write_text(line(2, a=0.5) + torn)
    assert newest_record(metrics, "a") == {"step": 2, "a": 0.5}


def test_a_file_that_is_empty_or_not_there_has_none(metrics):
    assert newest_record(metrics, "a") is None
    metrics.touch()
    assert newest_record(metrics, "a") is None
