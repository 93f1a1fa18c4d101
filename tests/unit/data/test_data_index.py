import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscale.config.cache import CACHE_VARIABLE
from vitscale.data.index import INDEX_SCHEMA, read_dataset, read_index, sha256_of_file, split_hash
from vitscale.data.split import open_split
from vitscale.errors import ShardError


@pytest.fixture
def copy(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset to damage; the cache does not know it yet."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
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
    sha256 = sha256_of_file(root / "train.parquet")
    edit_json(root, lambda tree: tree["splits"]["train"].update(index_sha256=sha256))


def test_hash_depends_on_content_and_not_on_shards(dataset: Path) -> None:
    table = pq.read_table(dataset / "train.parquet")
    classes = read_dataset(dataset).classes
    assert split_hash(classes, table) == split_hash(classes, pa.concat_tables([table[:20], table[20:20], table[20:]]))
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
            "schema_version is 9, this vitscale reads 2",
        ),
        (lambda root: edit_json(root, lambda t: t.pop("classes")), "dataset.json: classes: Field required"),
        (lambda root: (root / "train-000002.tar").unlink(), "train-000002.tar: shard is missing"),
        (truncate_shard, "train-000001.tar: shard has"),
        (lambda root: (root / "train.parquet").unlink(), "train.parquet: index is missing"),
        (overwrite("train.parquet", b"PAR1"), "index of another dataset, or damaged"),
        (index_with_fewer_columns, "columns are not those of schema 2"),
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


def test_an_index_gives_the_columns_that_are_asked_for(dataset: Path) -> None:
    table = read_index(dataset, read_dataset(dataset), "train", ("key", "wnid"))
    assert table.column_names == ["key", "wnid"]
    assert len(table) == 45
