import io
from collections.abc import Iterator

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from vitscale.bench import compare_concurrency, compare_decoders, photographs
from vitscale.bench import decode as module
from vitscale.bench.decode import BASELINE, PHOTO_KINDS, SIZE_PX, decode_ways
from vitscale.cli import bench as command
from vitscale.data import turbojpeg
from vitscale.data.decode import Box

SAME_PIXELS = {BASELINE, "vitscale, whole image", "vitscale, TurboJPEG 3"}


@pytest.fixture(scope="module")
def files() -> dict[str, list[bytes]]:
    return photographs(1)


def test_photographs_are_of_their_kind(files: dict[str, list[bytes]]) -> None:
    assert list(files) == [kind.name for kind in PHOTO_KINDS]
    for kind in PHOTO_KINDS:
        (data,) = files[kind.name]
        assert Image.open(io.BytesIO(data)).size == (kind.width, kind.height)
        assert 0.9 * kind.size_bytes < len(data) <= kind.size_bytes


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_all_ways_show_the_same_crop(files: dict[str, list[bytes]], interpolation: str) -> None:
    data = files["1600 x 1200, 600 KB"][0]
    box = Box(80, 160, 1000, 1120)
    ways = decode_ways(interpolation)
    expected = ways[BASELINE](data, box).int()
    for name, way in ways.items():
        result = way(data, box)
        assert result.shape == (3, SIZE_PX, SIZE_PX)
        difference = (result.int() - expected).abs().float()
        if name in SAME_PIXELS:
            assert difference.max() <= 7
        else:
            assert 0 < difference.mean() <= 12


def test_ways_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "find", lambda: None)
    assert "vitscale, TurboJPEG 3" not in decode_ways("bilinear")


def test_rates_and_ratios(files: dict[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(100.0))
    slow = iter([1, 2, 2, 1, 4, 2])  # seconds of the baseline and of ours in the warm-up and in two rounds

    def thread_time() -> float:
        return next(ticks)

    def tick() -> Iterator[float]:
        for seconds in slow:
            start = float(next(clock)) * 10
            yield start
            yield start + seconds

    ticks = tick()
    monkeypatch.setattr(module.time, "thread_time", thread_time)
    monkeypatch.setattr(module, "decode_ways", lambda _: dict.fromkeys([BASELINE, "ours"], lambda data, box: None))
    rates = list(compare_decoders({"small": files["341 x 256, 29 KB"]}, "bilinear", rounds=2))
    assert [(r.way, r.kind, r.images_per_s, r.ratio) for r in rates] == [
        (BASELINE, "small", pytest.approx(1 / 3), 1.0),
        ("ours", "small", pytest.approx(1 / 1.5), 2.0),
    ]


@pytest.mark.slow
def test_threads_beside_processes(files: dict[str, list[bytes]]) -> None:
    rates = compare_concurrency(files["341 x 256, 29 KB"], "bilinear", workers=2, rounds=1)
    assert list(rates) == ["1 thread", "2 threads", "2 processes"]
    assert min(rates.values()) > 0


def test_the_command_prints_a_table(files: dict[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"341 x 256, 29 KB": files["341 x 256, 29 KB"]}
    monkeypatch.setattr(command, "photographs", lambda count: small)
    monkeypatch.setattr(command, "compare_concurrency", lambda *_: {"1 thread": 10.0, "2 threads": 19.0})
    result = CliRunner().invoke(command.command, ["decode", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    assert "| images/s a core | 341 x 256, 29 KB | median |" in result.output
    assert f"| {BASELINE} | " in result.output
    assert "1 thread 10, 2 threads 19" in result.output
