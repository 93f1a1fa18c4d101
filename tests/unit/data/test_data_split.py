import os
import pickle
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distributed_runner import run_distributed_test
from http_server import FaultyServer, served
from micro_data import CLASSES, train_loader, write_dataset

from vitscale.config import BatchSplit, DataSection, RemoteSection, SplitSection
from vitscale.config.cache import CACHE_VARIABLE
from vitscale.data import split
from vitscale.data.index import DATASET_FILE, INDEX_SCHEMA, read_dataset, split_hash, write_dataset_json, write_index
from vitscale.data.labels import load_label_space
from vitscale.data.split import NO_CRC, SplitIndex, open_split
from vitscale.errors import ShardError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


def test_rows_point_at_the_images(dataset: Path, images: list[bytes]) -> None:
    index = open_split(dataset, "train")
    assert len(index) == len(images)
    for row, data in enumerate(images):
        with Path(index.shard_path(row)).open("rb") as shard:
            shard.seek(int(index.offset[row]))
            assert shard.read(int(index.size[row])) == data
        assert index.key(row) == f"image{row}"
        assert index.label[row] == row % 3
        assert index.crc32[row] == zlib.crc32(data)
    assert index.classes == CLASSES
    assert index.hash == split_hash(CLASSES, pq.read_table(dataset / "train.parquet"))


def test_a_pickled_index_is_small_and_opens_the_same_file(dataset: Path) -> None:
    index = open_split(dataset, "train")
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    copy: SplitIndex = pickle.loads(pickled)
    assert copy.keys.equals(index.keys)
    assert (copy.hash, copy.shards) == (index.hash, index.shards)
    for column in ("shard", "offset", "size", "label", "crc32"):
        np.testing.assert_array_equal(getattr(copy, column), getattr(index, column))
        assert not getattr(copy, column).flags.owndata


def test_the_parquet_file_is_read_once(dataset: Path, tmp_path: Path, cache: Path) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    first = open_split(root, "train")
    assert [file.suffix for file in sorted(cache.iterdir())] == [".arrow", ".lock"]
    (root / "train.parquet").unlink()
    assert open_split(root, "train", check_files=False).keys.equals(first.keys)
    with pytest.raises(ShardError, match="index is missing"):
        open_split(root, "train")
    assert first.mapped.parent == cache


def test_another_index_under_the_same_name_is_converted_anew(dataset: Path, tmp_path: Path, cache: Path) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    open_split(root, "train")
    table = pq.read_table(root / "train.parquet")
    reversed_rows = table.take(list(range(44, -1, -1)))
    sha256 = write_index(root / "train.parquet", reversed_rows)
    dataset_tree = read_dataset(root)
    files = dataset_tree.splits["train"].model_copy(update={"index_sha256": sha256})
    write_dataset_json(root, seed=0, plan="test", classes=CLASSES, splits={"train": files})
    assert open_split(root, "train").key(0) == "image44"


def _open(rank: int, world_size: int, dataset: Path, cache: str) -> tuple[int, int]:
    """How many rows a process finds, and how often it converts the index."""
    os.environ[CACHE_VARIABLE] = cache
    converted = []
    convert = split._convert
    split._convert = lambda *arguments: converted.append(rank) or convert(*arguments)
    return len(open_split(dataset, "train")), len(converted)


def test_many_processes_convert_once(dataset: Path, cache: Path) -> None:
    told = run_distributed_test(_open, 4, dataset, os.environ[CACHE_VARIABLE], init=False)
    assert [rows for rows, _ in told] == [45] * 4
    assert sum(converted for _, converted in told) == 1


def test_where_the_cache_cannot_be_written_the_temporary_folder_serves(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert open_split(dataset, "train").mapped.parent == tmp_path / f"vitscale-{os.getuid()}" / "index"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(ShardError, match=rf"no place for the index .*name a folder with room in {CACHE_VARIABLE}"):
        open_split(dataset, "train")


def test_a_cut_off_conversion_leaves_nothing_that_counts(
    dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(tempfile, "tempdir", str(dataset / DATASET_FILE))
        with pytest.raises(ShardError, match="no place for the index"):
            open_split(dataset, "train")
    assert not list(cache.glob("*.arrow"))
    assert len(open_split(dataset, "train")) == 45


def test_unknown_split_names_the_known_ones(dataset: Path) -> None:
    with pytest.raises(ShardError, match="no split 'test': it has train"):
        open_split(dataset, "test")


def test_a_crc_that_nobody_took_is_not_known(tmp_path: Path, images: list[bytes]) -> None:
    root = write_dataset(tmp_path / "set", images[:4])
    table = pq.read_table(root / "train.parquet")
    column = INDEX_SCHEMA.names.index("crc32")
    empty = table.set_column(column, INDEX_SCHEMA.field("crc32"), pa.array([None] * 4, pa.uint32()))
    files = (
        read_dataset(root)
        .splits["train"]
        .model_copy(update={"index_sha256": write_index(root / "train.parquet", empty)})
    )
    write_dataset_json(root, seed=0, plan="test", classes=CLASSES, splits={"train": files})
    assert open_split(root, "train").crc32.tolist() == [NO_CRC] * 4


def relabelled(root: Path, classes: tuple[str, ...]) -> None:
    """The dataset of three classes, under other names."""
    files = read_dataset(root).splits["train"]
    write_dataset_json(root, seed=0, plan="test", classes=classes, splits={"train": files})


def test_one_build_serves_other_label_spaces(tmp_path: Path, images: list[bytes]) -> None:
    root = write_dataset(tmp_path / "set", images)
    in1k = load_label_space("in1k").wnids
    relabelled(root, (in1k[7], "n99999999", in1k[3]))
    index = open_split(root, "train", label_space="in1k")
    rows = [row for row in range(45) if row % 3 != 1]
    assert [index.key(i) for i in range(len(index))] == [f"image{row}" for row in rows]
    assert index.label.tolist() == [7 if row % 3 == 0 else 3 for row in rows]
    assert index.classes == in1k
    assert index.hash != open_split(root, "train").hash
    relabelled(root, ("n99999997", "n99999998", "n99999999"))
    with pytest.raises(ShardError, match="no sample of split train has a class of the label space"):
        open_split(root, "train", label_space="in1k")


def test_shards_may_lie_elsewhere(dataset: Path, tmp_path: Path, images: list[bytes]) -> None:
    root = tmp_path / "index-only"
    root.mkdir()
    shutil.copy(dataset / "train.parquet", root)
    files = read_dataset(dataset).splits["train"]
    write_dataset_json(root, seed=0, plan="test", classes=CLASSES, splits={"train": files}, shards_at=str(dataset))
    assert open_split(root, "train").shard_path(0) == f"{dataset}/train-000000.tar"
    write_dataset_json(root, seed=0, plan="test", classes=CLASSES, splits={"train": files})
    with pytest.raises(ShardError, match=r"train-000000\.tar: shard is missing"):
        open_split(root, "train")
    assert len(open_split(root, "train", check_files=False)) == 45


def test_mapped_names_depend_on_the_version(dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_split(dataset, "train").mapped
    monkeypatch.setattr(split, "_MAPPED_VERSION", 99)
    assert open_split(dataset, "train").mapped != before


@pytest.fixture
def server(dataset: Path) -> Iterator[FaultyServer]:
    with served({file.name: file.read_bytes() for file in dataset.iterdir()}) as running:
        yield running


def test_a_dataset_behind_a_url(dataset: Path, cache: Path, server: FaultyServer) -> None:
    index = open_split(server.url, "train")
    assert (index.hash, index.location) == (open_split(dataset, "train").hash, server.url)
    assert index.shard_path(0) == f"{server.url}/train-000000.tar"
    open_split(server.url, "train")
    assert server.requests["train.parquet"] == 2  # one HEAD, one GET: the second time it is in the cache
    with pytest.raises(ShardError, match="no split 'test'"):
        open_split(server.url, "test")
    del server.files["dataset.json"]
    with pytest.raises(ShardError, match=rf"{server.url}/dataset\.json"):
        open_split(server.url, "train")


def test_training_behind_a_url_sees_what_training_on_the_disk_sees(
    section: DataSection, cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    split = BatchSplit(global_batch=16, micro_batch=16, grad_accum=1, world_size=1)
    remote = RemoteSection(patience_s=20, longest_pause_s=0.05)
    cached = remote.model_copy(update={"cache_folder": tmp_path / "shards"})
    for shard in ("train-000000.tar", "train-000003.tar"):
        server.fail(shard, "503", "short", "reset")
    expected = list(islice(train_loader(section, split), 6))
    for settings in (remote, cached, cached):
        source = SplitSection(path=server.url, split="train")
        loader = train_loader(section.model_copy(update={"train": source, "remote": settings}), split)
        for batch, wanted in zip(islice(loader, 6), expected, strict=True):
            assert torch.equal(batch.images, wanted.images)
            assert batch.cursor == wanted.cursor
            assert not batch.substitutions
        loader.close()
