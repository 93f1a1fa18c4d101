"""The check of a dataset: a sound one passes, and every kind of damage is one line that names its place."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.index_shards import index_shards
from data_tools.ustar import END_OF_TAR, entry
from data_tools.verify import verify
from vitscale.data.index import DATASET_FILE, INDEX_SCHEMA, read_dataset, read_index
from vitscale.errors import ShardError

Members = list[tuple[str, bytes]]


@pytest.fixture
def built(digits_dataset, tmp_path) -> Path:
    """A copy of what the builder wrote."""
    return Path(shutil.copytree(digits_dataset, tmp_path / "built"))


def faults(directory: Path, decode_images: bool = False) -> tuple[str, ...]:
    report = verify(directory, decode_images=decode_images, workers=1)
    assert report.lines()[: len(report.faults)] == list(report.faults)
    assert all("\n" not in line for line in report.lines())
    return report.faults


def first_shard(directory: Path) -> Path:
    return directory / read_dataset(directory).splits["train"].shards[0].name


def first_row(directory: Path) -> dict:
    table = read_index(directory, read_dataset(directory), "train", INDEX_SCHEMA.names)
    return next(row for row in table.to_pylist() if row["shard"] == first_shard(directory).name)


def rewrite(directory: Path, change: Callable[[Members], Members]) -> None:
    """Write the first shard anew with other members."""
    path = first_shard(directory)
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    pieces = [piece for name, content in change(members) for piece in entry(name, content)]
    path.write_bytes(b"".join(pieces) + END_OF_TAR)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def edit_dataset(directory: Path, change: Callable[[dict], None]) -> None:
    file = directory / DATASET_FILE
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


@pytest.mark.parametrize("decode_images", [False, True])
def test_a_dataset_of_the_builder_is_sound(digits_dataset, decode_images):
    report = verify(digits_dataset, decode_images=decode_images, workers=1)
    dataset = read_dataset(digits_dataset)
    assert report.faults == ()
    assert report.samples == sum(split.samples for split in dataset.splits.values()) == 120
    assert report.without_checksum == 0
    assert ": sound (" in report.lines()[-1]
    assert ("decoded" in report.lines()[-1]) == decode_images
    tree = json.loads(json.dumps(report.tree()))
    assert (tree["samples"], tree["faults"], tree["decoded"]) == (120, [], decode_images)


@pytest.mark.slow
def test_many_processes_find_the_same(built):
    flip(first_shard(built), first_row(built)["offset"] + 100)
    one, two = (verify(built, decode_images=True, workers=workers) for workers in (1, 2))
    assert one.faults == two.faults != ()


def test_a_changed_image_is_named(built):
    row = first_row(built)
    flip(first_shard(built), row["offset"] + row["size"] // 2)
    assert faults(built) == (f"{first_shard(built)}: sample {row['key']}: its crc32 is not the one in the index",)


@pytest.mark.parametrize(
    ("extension", "content", "said"),
    [
        ("cls", b"9", "its label is 9 in the shard"),
        ("cls", b"?", "its label is -1 in the shard"),
        ("cls", b"\xff", "has a .cls that cannot be read"),
        ("wnid", b"n99999999", "its class is n99999999 in the shard"),
    ],
)
def test_a_class_that_is_not_the_one_in_the_index_is_named(built, extension, content, said):
    def change(members: Members) -> Members:
        place = next(i for i, (name, _) in enumerate(members) if name.endswith(f".{extension}"))
        members[place] = (members[place][0], content)
        return members

    rewrite(built, change)
    found = faults(built)
    assert found[0].startswith(f"{first_shard(built)}: sample {first_row(built)['key']}: ")
    assert said in found[0]


def test_every_member_is_accounted_for(built):
    row = first_row(built)
    key = row["key"]
    samples = read_dataset(built).splits["train"].shards[0].samples

    rewrite(built, lambda members: [*members, ("more.jpeg", b"x"), ("more.cls", b"1"), ("more.wnid", b"n1")])
    found = faults(built)
    assert f"{first_shard(built)}: sample more: is not in the index" in found
    assert any("bytes, dataset.json says" in line for line in found)

    rewrite(built, lambda members: [*members[:-3], (f"{key}.pkl", b"surprise")])
    assert f"{first_shard(built)}: has {3 * samples + 1} members, 3 a sample would be right" in faults(built)

    rewrite(built, lambda members: members[3:-1])
    assert f"{first_shard(built)}: sample {key}: is in the index, not in the shard" in faults(built)


def test_many_missing_samples_are_counted(built):
    rewrite(built, lambda members: members[:3])
    assert any("more samples are in the index, not in the shard" in line for line in faults(built))


def test_an_image_elsewhere_than_the_index_says_is_named(built):
    rewrite(built, lambda members: [("a-new-file", b""), *members])
    assert sum("its image is not where the index says" in line for line in faults(built)) > 1


def test_a_shard_that_is_missing_cut_or_damaged_is_named(built):
    shard = first_shard(built)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    found = faults(built)
    assert "bytes, dataset.json says" in found[0]
    assert "cut off" in found[1]
    assert "what follows in this shard is not checked" in found[1]
    shard.write_bytes(b"?" + content[1:])
    assert "offset 0: damaged tar header" in faults(built)[0]
    shard.write_bytes(content.rstrip(b"\0"))
    assert "cut off" in faults(built)[-1]
    shard.unlink()
    assert faults(built) == (f"{shard}: shard is missing: copy it again",)


def test_an_index_that_does_not_belong_is_a_fault(built):
    train, val = built / "train.parquet", built / "val.parquet"
    content = train.read_bytes()
    train.write_bytes(val.read_bytes())
    assert "train.parquet: index of another dataset, or damaged" in faults(built)[0]
    train.write_bytes(content)
    shard = first_shard(built).name
    edit_dataset(built, lambda tree: tree["splits"]["train"]["shards"].pop(0))
    assert f"shard {shard} is not in {DATASET_FILE}" in faults(built)[0]


def test_the_index_and_dataset_json_must_count_the_same(built):
    edit_dataset(built, lambda tree: tree["splits"]["train"]["shards"][0].update(samples=1))
    assert any("dataset.json says 1" in line for line in faults(built))


def test_a_fragment_that_contradicts_the_index_is_named(built):
    fragment = first_shard(built).with_suffix(".parquet")
    table = pq.read_table(fragment)
    pq.write_table(table.slice(1), fragment)
    assert faults(built) == (f"{fragment}: its rows are not those of the split's index: copy both again",)
    pq.write_table(table, fragment)
    assert faults(built) == ()
    edit_dataset(built, lambda tree: tree["splits"]["train"]["shards"][0].update(sha256="0" * 64))
    assert "SHA-256" in faults(built)[0]
    fragment.write_bytes(b"junk")
    assert faults(built) == (f"{fragment}: damaged: copy it again",)


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(ShardError, match="not found"):
        verify(tmp_path, decode_images=False, workers=1)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def foreign(tmp_path: Path, members: Members, crc: bool = True) -> Path:
    (tmp_path / "set").mkdir()
    shard = tmp_path / "set" / "x.tar"
    shard.write_bytes(b"".join(piece for name, data in members for piece in entry(name, data)) + END_OF_TAR)
    index_shards({"train": [shard]}, tmp_path / "set", classes=None, label_space=None, crc=crc, workers=1)
    return tmp_path / "set"


def test_indexed_shards_may_hold_anything_else(tmp_path):
    members = [
        ("a.jpg", picture()),
        ("a.cls", b"0"),
        ("a.npy", b"?"),
        ("README", b""),
        ("b.jpg", b"junk"),
        ("b.cls", b"0"),
    ]
    directory = foreign(tmp_path, members, crc=False)
    report = verify(directory, decode_images=True, workers=1)
    assert report.faults == ()  # b cannot be read, and the index says so
    assert report.without_checksum == 2
    assert "2 samples have no checksum" in report.lines()[-1]


def test_only_decoding_finds_an_image_that_was_cut_before_it_was_indexed(tmp_path):
    whole = picture()
    directory = foreign(tmp_path, [("a.jpg", whole[: len(whole) // 2]), ("a.cls", b"0")])
    assert faults(directory) == ()
    (line,) = faults(directory, decode_images=True)
    assert line.startswith(f"{directory / 'x.tar'}: sample a: jpeg: ")


def test_without_checksums_the_header_still_tells_another_image(tmp_path):
    data = picture()
    directory = foreign(tmp_path, [("a.jpg", data), ("a.cls", b"0")], crc=False)
    shard = directory / "x.tar"
    content = shard.read_bytes()
    place = content.index(b"\xff\xc0\x00\x11\x08") + 6
    shard.write_bytes(content[:place] + bytes([content[place] - 1]) + content[place + 1 :])  # its height in pixels
    assert "the index says ('jpeg', 40, 30)" in faults(directory)[0]
    shard.write_bytes(content.replace(data[:3], b"???"))
    assert "not an image" in faults(directory)[0]
