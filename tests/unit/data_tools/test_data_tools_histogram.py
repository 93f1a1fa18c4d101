"""Histograms: every value falls into its bin, and the drawing shows every bin and escapes every name."""

from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.histogram import BINS, HEIGHT, WIDTH, bars_svg, histogram_svg, log_histogram, log_ticks, nice_step

amounts = st.lists(st.integers(0, 10**12) | st.integers(0, 40), min_size=1, max_size=50)


@given(amounts)
def test_every_value_is_counted_in_its_bin(values):
    histogram = log_histogram(values)
    counted = [
        sum(left < max(value, 1) < right for value in values)
        for left, right in zip(histogram.edges, histogram.edges[1:], strict=False)
    ]
    assert histogram.counts.tolist() == counted
    assert sum(counted) == len(values)


@given(amounts)
def test_bins_are_few_and_never_narrower_than_the_one_before(values):
    widths = np.diff(log_histogram(values).edges)
    assert len(widths) <= BINS
    assert (np.diff(widths) >= 0).all()


@given(amounts)
def test_the_drawing_has_a_bar_for_each_bin_that_holds_something(values):
    histogram = log_histogram(values)
    svg = ElementTree.fromstring(histogram_svg(histogram, title="<&", x_name="<x>", y_name="&"))
    bars = svg.findall("rect")
    assert len(bars) == np.count_nonzero(histogram.counts)
    assert svg.find("title").text == "<&"
    for bar in bars:
        assert 0 <= float(bar.get("x")) <= float(bar.get("x")) + float(bar.get("width")) <= WIDTH
        assert 0 <= float(bar.get("y")) <= float(bar.get("y")) + float(bar.get("height")) <= HEIGHT
    heights = {
        float(bar.get("height")) for bar in bars if bar.find("title").text.endswith(f": {histogram.counts.max()}")
    }
    assert heights == {max(float(bar.get("height")) for bar in bars)}


@given(st.integers(1, 10**9))
def test_marks_are_round_and_at_most_five(most):
    step = nice_step(most)
    assert str(step).rstrip("0") in ("1", "2", "5")
    assert most // step <= 5


@given(st.integers(1, 10**9), st.integers(0, 10**9))
def test_marks_lie_on_a_logarithmic_axis_and_are_few(least, more):
    first, last = least - 0.5, least + more + 0.5
    ticks = log_ticks(first, last)
    assert ticks
    assert all(first <= tick <= last for tick in ticks)
    assert len(ticks) <= 10


def test_bars_tell_each_amount_and_its_share():
    svg = ElementTree.fromstring(bars_svg({"jpeg": 3000, "<png>": 1000}, title="Formats"))
    assert [text.text for text in svg.findall("text")] == ["jpeg", "3,000 (75 %)", "<png>", "1,000 (25 %)"]
    long, short = (float(bar.get("width")) for bar in svg.findall("rect"))
    assert long == pytest.approx(3 * short, abs=0.2)
