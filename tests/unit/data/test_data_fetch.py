import shutil
from pathlib import Path

import numpy as np
import pytest

from vitscale.data import fetch
from vitscale.data.decode import BadSample
from vitscale.data.fetch import SampleReader
from vitscale.data.index import open_split
from vitscale.errors import ShardError


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reads_the_bytes_with_few_open_shards(
    dataset: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_OPEN_SHARDS", 2)
    reader = SampleReader(open_split(dataset, "train"))
    before = _open_files()
    rows = np.random.default_rng(0).permutation(len(images))
    assert [reader.read(int(row)) for row in rows] == [images[row] for row in rows]
    assert _open_files() == before + 2
    reader.close()
    assert _open_files() == before


def test_reading_order_goes_forwards(dataset: Path) -> None:
    reader = SampleReader(open_split(dataset, "train"))
    rows = np.random.default_rng(0).permutation(45)[:20]
    assert rows[reader.reading_order(rows)].tolist() == sorted(rows.tolist())


def test_changed_bytes_are_a_bad_sample(copy: Path) -> None:
    index = open_split(copy, "train")
    with index.shard_path(9).open("r+b") as shard:
        shard.seek(int(index.offset[9]) + 100)
        shard.write(b"\0\1\2\3")
    reader = SampleReader(index)
    with pytest.raises(BadSample, match="crc32"):
        reader.read(9)
    reader.read(8)


def test_a_lost_shard_is_named_with_the_key(copy: Path) -> None:
    index = open_split(copy, "train")
    index.shard_path(9).unlink()
    with pytest.raises(ShardError, match=r"train-000001\.tar: sample image9 cannot be read \(No such file"):
        SampleReader(index).read(9)
