import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from micro_data import write_dataset

from vitscale.data import fetch
from vitscale.data.batch import Traffic
from vitscale.data.decode import BadSample
from vitscale.data.fetch import SampleReader, checked, cut_windows, read_ahead
from vitscale.data.mixture import Samples
from vitscale.data.shards import LocalShards
from vitscale.data.split import NO_CRC, open_split
from vitscale.errors import ShardError


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def reader_of(*datasets: Path) -> SampleReader:
    indexes = tuple(open_split(path, "train") for path in datasets)
    return SampleReader(Samples(indexes), [LocalShards(Path(index.location)) for index in indexes])


def test_ranges_join_neighbours_and_bring_every_row_once(dataset: Path, images: list[bytes]) -> None:
    reader = reader_of(dataset)
    rows = np.array([20, 3, 4, 5, 21, 3, 40])  # shards of 7: 0-6, 14-20, 21-27, 35-41
    ranges = reader.ranges(rows)
    assert [reads.rows for reads in ranges] == [(20,), (3, 4, 5), (21,), (40,)]
    found = {row: data for reads in ranges for row, (data, _) in reader.read_range(reads).items()}
    assert {row: bytes(data) for row, data in found.items()} == {row: images[row] for row in set(rows.tolist())}


def test_traffic_counts_the_headers_between_neighbours(dataset: Path, images: list[bytes]) -> None:
    reader = reader_of(dataset)
    (reads,) = reader.ranges(np.array([4, 3]))
    reader.read_range(reads)
    between = -len(images[3]) % 512 + 512
    used = len(images[3]) + len(images[4])
    assert reader.traffic == Traffic(read_bytes=used + between, used_bytes=used, reads=1)


@given(st.lists(st.integers(0, 44), min_size=1, max_size=60), st.integers(0, 3000), st.integers(1, 5000))
def test_whatever_the_limits_ranges_hold_the_rows(
    dataset: Path, images: list[bytes], rows: list[int], gap: int, size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "MAX_GAP_BYTES", gap)
        patch.setattr(fetch, "MAX_RANGE_BYTES", size)
        reader = reader_of(dataset)
        ranges = reader.ranges(np.array(rows))
    held = [row for reads in ranges for row in reads.rows]
    assert sorted(held) == sorted(set(rows))
    for reads in ranges:
        assert all(bytes(data) == images[row] for row, (data, _) in reader.read_range(reads).items())
        assert reads.size <= size + 2 * max(map(len, images)) + gap * len(reads.rows)
    # Ranges come in the order in which their rows are first asked for.
    first = [min(rows.index(row) for row in reads.rows) for reads in ranges]
    assert first == sorted(first)


def test_sources_are_read_each_from_its_own_shards(dataset: Path, tmp_path: Path, images: list[bytes]) -> None:
    other = write_dataset(tmp_path / "other", images[:3][::-1])
    reader = reader_of(dataset, other)
    assert [reader.read(row) for row in (0, 45, 47)] == [images[0], images[2], images[0]]


def test_windows_end_where_rounds_do_and_where_they_are_full(dataset: Path) -> None:
    samples = reader_of(dataset).samples
    requests = [np.array([i, i + 1]) for i in range(12)]
    size = int(samples.column("size", np.arange(45)).max())
    by_round = cut_windows(requests, lambda r: r, samples, limit_bytes=10**9, round_of=lambda r: r[0] // 4)
    assert [len(window.requests) for window in by_round] == [1, 3, 4, 4]
    # Of some micro-batches nothing falls to a worker: that cuts no window.
    nothing = np.array([], dtype=np.int64)
    sparse = [requests[0], nothing, *(part for request in requests[1:] for part in (request, nothing))]
    by_round = cut_windows(sparse, lambda r: r, samples, limit_bytes=10**9, round_of=lambda r: r[0] // 4)
    windows = [[int(r[0]) for r in window.requests if len(r)] for window in by_round]
    assert windows == [[0], [1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    by_size = list(cut_windows(requests, lambda r: r, samples, limit_bytes=6 * size))
    assert len(by_size[0].requests) == 1
    assert all(samples.column("size", window.rows).sum() <= 6 * size for window in by_size)
    assert max(len(window.requests) for window in by_size) >= 3
    assert [r[0] for window in by_size for r in window.requests] == list(range(12))


@pytest.mark.parametrize("limit_bytes", [1, 5000, 10**9])
def test_reading_ahead_gives_every_request_its_bytes(dataset: Path, images: list[bytes], limit_bytes: int) -> None:
    reader = reader_of(dataset)
    rng = np.random.default_rng(0)
    requests = [rng.integers(0, 45, 5) for _ in range(20)] + [np.array([], dtype=np.int64)]
    windows = cut_windows(requests, lambda r: r, reader.samples, limit_bytes=limit_bytes)
    for request, fetched in read_ahead(windows, reader, threads=3):
        assert [fetched.read(row) for row in request.tolist()] == [images[row] for row in request]
        assert fetched.read(7) == images[7]  # of another window, or of none


def test_reading_ahead_runs_one_window_ahead_and_no_further(dataset: Path) -> None:
    reader = reader_of(dataset)
    taken: list[int] = []

    def requests():
        for i in range(10):
            taken.append(i)
            yield np.array([i])

    windows = cut_windows(requests(), lambda r: r, reader.samples, limit_bytes=1)
    stream = read_ahead(windows, reader, threads=1)
    next(stream)
    assert taken == [0, 1, 2]  # one in use, one on its way, and the one that ended it
    stream.close()


@pytest.mark.fault(27)
def test_changed_bytes_are_a_bad_sample(copy: Path) -> None:
    index = open_split(copy, "train")
    with Path(index.shard_path(9)).open("r+b") as shard:
        shard.seek(int(index.offset[9]) + 100)
        shard.write(b"\0\1\2\3")
    reader = reader_of(copy)
    with pytest.raises(BadSample, match="crc32"):
        reader.read(9)
    reader.read(8)


def test_a_lost_shard_is_named(copy: Path) -> None:
    reader = reader_of(copy)
    Path(reader.samples.shard_path(9)).unlink()
    with pytest.raises(ShardError, match=r"train-000001\.tar: cannot be read \(No such file"):
        reader.read(9)
    windows = cut_windows([np.array([9])], lambda r: r, reader.samples, limit_bytes=1)
    ((_, fetched),) = read_ahead(windows, reader, threads=1)
    with pytest.raises(ShardError, match=r"train-000001\.tar"):
        fetched.read(9)


def test_without_a_crc_nothing_is_checked(images: list[bytes]) -> None:
    data = memoryview(images[9])
    assert checked(data, zlib.crc32(data)) == checked(data, NO_CRC) == images[9]
    with pytest.raises(BadSample, match="crc32"):
        checked(data, zlib.crc32(data) ^ 1)
