import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscale.data.index import INDEX_SCHEMA, SplitIndex, _sha256_of_file, open_split, read_dataset, split_hash
from vitscale.errors import ShardError


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def edit_json(root: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((root / "dataset.json").read_text())
    edit(tree)
    (root / "dataset.json").write_text(json.dumps(tree))


def edit_index(root: Path, column: str, values: list[Any]) -> None:
    """Replace a column, with dataset.json told of the new file."""
    table = pq.read_table(root / "train.parquet")
    table = table.set_column(
        table.column_names.index(column), column, pa.array(values, INDEX_SCHEMA.field(column).type)
    )
    pq.write_table(table.cast(INDEX_SCHEMA), root / "train.parquet")
    acknowledge_index(root)


def acknowledge_index(root: Path) -> None:
    sha256 = _sha256_of_file(root / "train.parquet")
    edit_json(root, lambda tree: tree["splits"]["train"].update(index_sha256=sha256))


def test_rows_point_at_the_images(dataset: Path, images: list[bytes]) -> None:
    index = open_split(dataset, "train")
    assert len(index) == len(images)
    for row, data in enumerate(images):
        with index.shard_path(row).open("rb") as shard:
            shard.seek(int(index.offset[row]))
            assert shard.read(int(index.size[row])) == data
        assert index.key(row) == f"image{row}"
        assert index.label[row] == row % 3
        assert index.crc32[row] == zlib.crc32(data)


def test_index_travels_to_a_loader_process(dataset: Path) -> None:
    index = open_split(dataset, "train")
    copy: SplitIndex = pickle.loads(pickle.dumps(index))
    assert copy.keys.equals(index.keys)
    np.testing.assert_array_equal(copy.offset, index.offset)


def test_hash_depends_on_content_and_not_on_shards(dataset: Path) -> None:
    table = pq.read_table(dataset / "train.parquet")
    classes = read_dataset(dataset).classes
    same = table.set_column(2, INDEX_SCHEMA.field("offset"), pa.array([0] * len(table), pa.int64()))
    other = table.set_column(9, INDEX_SCHEMA.field("crc32"), pa.array([0] * len(table), pa.uint32()))
    assert open_split(dataset, "train").hash == split_hash(classes, table) == split_hash(classes, same)
    hashes = {split_hash(classes, table), split_hash(classes, other), split_hash(classes[::-1], table)}
    assert len(hashes) == 3
    assert split_hash(classes, table.take(list(range(44, -1, -1)))) not in hashes


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / name).write_bytes(content)

    return damage


def truncate_shard(root: Path) -> None:
    shard = root / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])


def index_with_fewer_columns(root: Path) -> None:
    pq.write_table(pq.read_table(root / "train.parquet").drop_columns("crc32"), root / "train.parquet")
    acknowledge_index(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "dataset.json").unlink(), "dataset.json: not found: give the folder"),
        (overwrite("dataset.json", b"{"), "dataset.json: cannot be read"),
        (overwrite("dataset.json", b"[]"), "schema_version is None"),
        (
            lambda root: edit_json(root, lambda t: t.update(schema_version=9)),
            "schema_version is 9, this vitscale reads 1",
        ),
        (lambda root: edit_json(root, lambda t: t.pop("classes")), "dataset.json: classes: Field required"),
        (lambda root: (root / "train-000002.tar").unlink(), "train-000002.tar: shard is missing"),
        (truncate_shard, "train-000001.tar: shard has"),
        (lambda root: (root / "train.parquet").unlink(), "train.parquet: index is missing"),
        (overwrite("train.parquet", b"PAR1"), "index of another dataset, or damaged"),
        (index_with_fewer_columns, "columns are not those of schema 1"),
        (
            lambda root: edit_json(root, lambda t: t["splits"]["train"].update(samples=44)),
            "45 samples, dataset.json says 44",
        ),
        (
            lambda root: edit_json(root, lambda t: t["splits"]["train"]["shards"].pop()),
            "shard train-000006.tar is not in",
        ),
        (lambda root: edit_index(root, "offset", [10**6] * 45), "a sample lies beyond the end of its shard"),
        (lambda root: edit_index(root, "label", [3] * 45), "a label is outside the 3 classes"),
    ],
)
def test_a_damaged_dataset_is_one_line(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ShardError) as raised:
        open_split(copy, "train")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_split_names_the_known_ones(dataset: Path) -> None:
    with pytest.raises(ShardError, match="no split 'test': it has train"):
        open_split(dataset, "test")
