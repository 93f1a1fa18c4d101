"""Histograms over a logarithmic axis, and bars of a few named amounts, as SVG that takes its colours from the page."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_tools.quantities import counted, short_number

BINS = 30
MOST_TICKS = 6

# The drawing, in units of its own; the page scales it.
WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 68, 12, 12, 48
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
BAR_GAP = 2
NAME_WIDTH, ROW_HEIGHT = 64, 34


@dataclass(frozen=True)
class Histogram:
    """Counts of whole numbers between neighbouring edges, which end in .5. edges [B + 1], counts [B]."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


def log_histogram(values: ArrayLike) -> Histogram:
    """Count whole numbers, at least one of them, in up to BINS bins; numbers below 1 count as 1.

    Bins grow by a constant factor, where they are too wide for whole numbers to matter; none is narrower than the
    one before it, or it would look empty beside it.
    """
    numbers = np.maximum(values, 1)
    least, most = int(numbers.min()), int(numbers.max())
    factor = ((most + 1) / least) ** (1 / BINS)
    firsts, width = [least], 1
    while firsts[-1] <= most:
        width = max(width, math.ceil(firsts[-1] * (factor - 1)))
        firsts.append(firsts[-1] + width)
    edges = np.array(firsts) - 0.5
    return Histogram(edges, np.histogram(numbers, edges)[0])


def histogram_svg(histogram: Histogram, *, title: str, x_name: str, y_name: str) -> str:
    """Draw a histogram.

    Args:
        histogram: what to draw.
        title: what it shows, for those who do not see it.
        x_name: quantity and unit on the axis of values.
        y_name: what is counted.
    """
    first, last = math.log(histogram.edges[0]), math.log(histogram.edges[-1])
    step = nice_step(int(histogram.counts.max()))
    top = step * -(-int(histogram.counts.max()) // step)

    def x(value: float) -> float:
        return LEFT + PLOT_WIDTH * (math.log(value) - first) / (last - first)

    def y(count: float) -> float:
        return TOP + PLOT_HEIGHT * (1 - count / top)

    parts = []
    for tick in range(0, top + 1, step):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 5:.1f}" text-anchor="end">{_mark(tick)}</text>')
    for left, right, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        if count:
            height = max(1.0, PLOT_HEIGHT * count / top)
            label = f"{counted(left + 0.5)} to {counted(right - 0.5)}: {counted(count)}"
            parts.append(
                f'<rect class="bar" x="{x(left):.1f}" y="{TOP + PLOT_HEIGHT - height:.1f}" '
                f'width="{max(1.0, x(right) - x(left) - BAR_GAP):.1f}" height="{height:.1f}">'
                f"<title>{label}</title></rect>"
            )
    parts += [
        f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_mark(tick)}</text>'
        for tick in log_ticks(histogram.edges[0], histogram.edges[-1])
    ]
    parts.append(
        f'<text class="name" x="{LEFT + PLOT_WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
    )
    parts.append(
        f'<text class="name" x="14" y="{TOP + PLOT_HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {TOP + PLOT_HEIGHT / 2})">{escape(y_name)}</text>'
    )
    return _svg(title, HEIGHT, parts)


def bars_svg(amounts: Mapping[str, int], *, title: str) -> str:
    """Draw named amounts, at least one of them, as a row each, with its share of their sum."""
    most, total = max(amounts.values()), sum(amounts.values())
    room = WIDTH - NAME_WIDTH - RIGHT
    parts = []
    for place, (name, amount) in enumerate(amounts.items()):
        top = TOP + place * ROW_HEIGHT
        text = f"{counted(amount)} ({100 * amount / total:.3g} %)"
        # The longest bar leaves room for its text.
        width = max(1.0, (room - 180) * amount / most)
        parts.append(f'<text x="{NAME_WIDTH - 8}" y="{top + 17}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar" x="{NAME_WIDTH}" y="{top}" width="{width:.1f}" height="{ROW_HEIGHT - 10}" rx="2"/>'
        )
        parts.append(f'<text x="{NAME_WIDTH + width + 8:.1f}" y="{top + 17}">{text}</text>')
    return _svg(title, TOP + len(amounts) * ROW_HEIGHT, parts)


def nice_step(most: int) -> int:
    """Distance of marks at 1, 2 or 5 times a power of ten, so that at most five reach a number."""
    rough = max(1.0, most / 5)
    power = 10 ** math.floor(math.log10(rough))
    return int(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough))


def log_ticks(first: float, last: float) -> list[int]:
    """Whole numbers to mark on a logarithmic axis from `first` to `last`, between which lies at least one."""
    if last < 4 * first:
        step = nice_step(int(last - first))
        return list(range(-int(-first // step) * step, int(last) + 1, step))
    powers = [10**power for power in range(math.ceil(math.log10(last)) + 1)]
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * power for power in powers for factor in factors if first <= factor * power <= last]
        if len(ticks) <= MOST_TICKS:
            break
    return ticks


def _mark(number: int) -> str:
    return counted(number) if number < 10_000 else short_number(number)


def _svg(title: str, height: int, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
