"""Datasets made of shards that exist already: what webdataset reads is what the index says, and what is refused."""

import io
import json
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.index_shards import find_shards, index_shards, scan_shard
from vitscale.data.index import INDEX_SCHEMA, read_dataset, read_index
from vitscale.errors import ShardError

WNIDS = ("n00000003", "n00000001", "n00000002")


def image(seed: int, form: str = "JPEG", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (10 + seed % 7, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def index(shards, out: Path, *, classes=None, crc=True, label_space=None, workers=1, val=()):
    splits = {"train": shards} | ({"val": val} if val else {})
    return index_shards(splits, out, classes=classes, label_space=label_space, crc=crc, workers=workers)


def rows(out: Path, split: str = "train") -> list[dict]:
    return read_index(out, read_dataset(out), split, INDEX_SCHEMA.names).to_pylist()


def refusal(shards, out: Path, **options) -> str:
    with pytest.raises(ShardError) as caught:
        index(shards, out, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert not out.exists()
    return text


def sample(key: str, label: object = 0, form: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{key}.{form}", image(1)), (f"{key}.cls", str(label).encode())]


FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Two shards of 12 samples, with long names, captions and members of other kinds in between."""
    folder = tmp_path / "shards"
    folder.mkdir()
    paths = []
    for number in range(2):
        members = []
        for i in range(6 * number, 6 * number + 6):
            key, form = f"{'long/' * (30 * (i % 2))}img_{i}", FORMATS[i % 4]
            picture = (f"{key}.{form if i % 3 else form.lower()}", image(i, form))
            label = (f"{key}.cls", str(i % 3).encode())
            caption = (f"{key}.txt", b"a picture of something")
            members += [picture, caption, label] if i % 2 else [label, picture, (f"{key}.seg.npy", b"\x93NUMPY")]
        paths.append(
            write_tar(folder / f"set-{number:03d}.tar", members, (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[number])
        )
    return paths


@pytest.mark.parametrize("crc", [True, False])
def test_the_index_says_what_webdataset_reads(shards, tmp_path, crc):
    report = index(shards, tmp_path / "out", classes=WNIDS, crc=crc)
    found = rows(tmp_path / "out")
    read = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))
    assert len(found) == len(read) == report.samples["train"] == 12
    for row, expected in zip(found, read, strict=True):
        (content,) = (expected[name] for name in ("jpeg", "jpg", "png", "webp", "gif") if name in expected)
        with (shards[0].parent / row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            assert file.read(row["size"]) == content
        picture = Image.open(io.BytesIO(content))
        assert (row["width"], row["height"], row["format"]) == (*picture.size, picture.format.lower())
        assert (row["key"], row["label"]) == (expected["__key__"], int(expected["cls"]))
        assert row["wnid"] == WNIDS[row["label"]]
        assert row["crc32"] == (zlib.crc32(content) if crc else None)


def test_the_dataset_names_its_shards_where_they_are(shards, tmp_path):
    report = index(shards[:1], tmp_path / "out", val=shards[1:], classes=WNIDS, label_space="three")
    dataset = read_dataset(tmp_path / "out")
    assert dataset.shards_at == str(shards[0].parent)
    assert (dataset.classes, dataset.label_space) == (WNIDS, "three")
    files = [file for split in dataset.splits.values() for file in split.shards]
    assert [(file.name, file.size_bytes, file.samples) for file in files] == [
        (path.name, path.stat().st_size, 6) for path in shards
    ]
    assert report.samples == {"train": 6, "val": 6}
    assert report.tree()["shard_bytes"] == sum(path.stat().st_size for path in shards)
    assert "6 train, 6 val samples of 3 classes in 2 shards" in report.lines()[0]


@pytest.mark.slow
def test_nothing_depends_on_the_workers(shards, tmp_path):
    for workers in (1, 2):
        index(shards, tmp_path / str(workers), classes=WNIDS, workers=workers)
    for name in ("train.parquet", "dataset.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_shards_may_lie_in_several_folders_or_beside_their_index(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "x.tar", sample(name))
    index([tmp_path / "a/x.tar", tmp_path / "b/x.tar"], tmp_path / "out")
    assert read_dataset(tmp_path / "out").shards_at == str(tmp_path)
    assert [row["shard"] for row in rows(tmp_path / "out")] == ["a/x.tar", "b/x.tar"]
    index([tmp_path / "a/x.tar"], tmp_path / "a")
    assert read_dataset(tmp_path / "a").shards_at == ""
    with pytest.raises(ShardError, match="holds a dataset already"):
        index([tmp_path / "a/x.tar"], tmp_path / "a")


def test_the_size_of_a_jpeg_is_found_behind_any_amount_of_metadata(tmp_path):
    pictures = [image(1, icc_profile=b"x" * size) for size in (0, 5_000, 100_000)]
    members = [pair for i, data in enumerate(pictures) for pair in ((f"{i}.jpg", data), (f"{i}.cls", b"0"))]
    path = write_tar(tmp_path / "x.tar", members)
    for crc in (True, False):
        table = scan_shard(path, crc)
        assert table["width"].to_pylist() == [20] * 3
        assert table["height"].to_pylist() == [11] * 3


def test_images_that_cannot_be_read_stay_and_are_counted(tmp_path):
    members = [*sample("a"), ("b.jpg", b"not an image"), ("b.cls", b"0"), ("c.png", b""), ("c.cls", b"0")]
    members += [("d.png", image(1, "PNG")[:20]), ("d.cls", b"0"), ("e.jpg", image(300)[:30]), ("e.cls", b"0")]
    report = index([write_tar(tmp_path / "x.tar", members)], tmp_path / "out")
    assert report.unreadable == ("b", "c", "d", "e")
    assert "4 images cannot be read, training replaces them: b, c, d, e" in report.lines()[1]
    found = rows(tmp_path / "out")
    assert [row["format"] for row in found] == ["jpeg", "unknown", "unknown", "png", "jpeg"]
    assert [row["width"] for row in found] == [20, 0, 0, 0, 0]


def test_images_larger_than_the_buffer_are_read_whole(tmp_path):
    big = image(1, "PNG") + bytes(400_000)
    path = write_tar(tmp_path / "x.tar", [*sample("a"), ("b.png", big), ("b.cls", b"0"), *sample("c")])
    assert scan_shard(path, True)["crc32"].to_pylist() == [zlib.crc32(data) for data in (image(1), big, image(1))]


@pytest.mark.fault(32)
def test_nothing_in_a_shard_is_executed(tmp_path, monkeypatch):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (canary,)

    assert not canary.exists()
    pickled = pickle.dumps(Bomb())
    names = ("a.pkl", "a.pyd", "a.pickle", "a.pt", f"pipe:touch {canary}.cls2", "setup.py")
    members = [*sample("a"), *((name, pickled) for name in names), *sample("b")]
    index([write_tar(tmp_path / "x.tar", members)], tmp_path / "out")
    assert [row["key"] for row in rows(tmp_path / "out")] == ["a", "b"]
    with pytest.raises(ShardError, match="only files of this machine"):
        find_shards([f"pipe:touch {canary}"])
    assert not canary.exists()
    pickle.loads(pickled)
    assert canary.exists()  # it would have worked


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([*sample("a"), *sample("../b")], "offset 2560: member ../b.jpg points out"),
        ([*sample("a"), *sample("b"), *sample("a")], "key a is taken already, in x.tar at offset 512"),
        ([("a.jpg", image(0)), ("a.png", image(0, "PNG")), ("a.cls", b"0")], "offset 0: sample a has 2 images"),
        ([("a.cls", b"0")], "offset 0: sample a has 0 images"),
        ([("a.jpg", image(0)), ("a.txt", b"two words")], "sample a has no class"),
        ([*sample("a", -1)], "label -1"),
        ([*sample("a", 3)], "offset 512: sample a: label 3, of 3 classes"),
        ([("README", b"")], "holds no samples"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused_with_their_place(tmp_path, members, said):
    shard = write_tar(tmp_path / "x.tar", members)
    text = refusal([shard], tmp_path / "out", classes=WNIDS)
    assert str(shard) in text
    assert said in text


@pytest.mark.parametrize("keep", [0.3, 0.9])
@pytest.mark.fault(26)
def test_a_truncated_shard_is_refused(shards, tmp_path, keep):
    content = shards[1].read_bytes().rstrip(b"\0")
    shards[1].write_bytes(content[: int(keep * len(content))])
    text = refusal(shards, tmp_path / "out")
    assert str(shards[1]) in text
    assert "offset" in text
    assert "cut off" in text


def test_a_damaged_header_is_refused(shards, tmp_path):
    content = bytearray(shards[0].read_bytes())
    content[3] ^= 1
    shards[0].write_bytes(content)
    assert "offset 0: damaged tar header" in refusal(shards, tmp_path / "out")


def test_shards_are_found_by_folder_pattern_and_braces(shards, tmp_path):
    folder = shards[0].parent
    expected = tuple(shards)
    assert find_shards([str(folder)]) == expected
    assert find_shards([f"{folder}/set-*.tar"]) == expected
    assert find_shards([f"{folder}/set-{{000..001}}.tar"]) == expected
    assert find_shards([str(path) for path in reversed(shards)]) == expected[::-1]
    for word in (f"{folder}/set-{{000..002}}.tar", str(tmp_path / "nowhere"), f"{folder}/*.zip"):
        with pytest.raises(ShardError, match="no shard of this name"):
            find_shards([word])
    with pytest.raises(ShardError, match="only files of this machine"):
        find_shards(["https://example.org/a.tar"])


def test_a_report_can_be_printed_as_json(shards, tmp_path):
    assert json.loads(json.dumps(index(shards, tmp_path / "out").tree()))["classes"] == 3
