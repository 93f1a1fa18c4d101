"""The builder through its command: what it writes, that webdataset reads the same, and what it refuses."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vitscale.data.index import SplitIndex, open_split

WNIDS = ("n00000002", "n00000001", "n00000003")
A_CLASS = 20


def image(seed: int, format_: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for c, wnid in enumerate(WNIDS):
        members = {f"{wnid}_{i}.JPEG": image(100 * c + i, "PNG" if i == 0 else "JPEG") for i in range(A_CLASS)}
        write_tar(folder / f"{wnid}.tar", members)
    return folder


def command(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data_tools", *map(str, words)], capture_output=True, text=True, timeout=120
    )


def build(source: Path, out: Path, *options: object) -> subprocess.CompletedProcess:
    return command("build", "--source", "class-tars", source, "--out", out, "--shard-images", 16, *options)


def refused(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def samples(index: SplitIndex) -> dict[str, tuple[int, bytes]]:
    found = {}
    for row in range(len(index)):
        with index.shard_path(row).open("rb") as shard:
            shard.seek(int(index.offset[row]))
            found[index.key(row)] = int(index.label[row]), shard.read(int(index.size[row]))
    return found


def test_webdataset_finds_what_the_index_says_and_no_image_is_lost(source, tmp_path):
    out = tmp_path / "out"
    assert build(source, out, "--val-fraction", 0.25).returncode == 0
    whole = {}
    for split in ("train", "val"):
        indexed = samples(open_split(out, split))
        shards = sorted(str(path) for path in out.glob(f"{split}-*.tar"))
        read = {}
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            (content,) = (sample[ext] for ext in ("jpeg", "jpg", "png") if ext in sample)
            read[sample["__key__"]] = int(sample["cls"]), content
        assert read == indexed
        assert not whole.keys() & read.keys()
        whole |= read
    classes = json.loads((out / "dataset.json").read_text())["classes"]
    assert classes == sorted(WNIDS)
    originals = {
        f"{wnid}_{i}": (classes.index(wnid), image(100 * c + i, "PNG" if i == 0 else "JPEG"))
        for c, wnid in enumerate(WNIDS)
        for i in range(A_CLASS)
    }
    assert whole == originals
    val = open_split(out, "val")
    assert np.bincount(val.label).tolist() == [5, 5, 5]


def test_the_bytes_do_not_depend_on_the_workers_and_classes_are_mixed(source, tmp_path):
    for workers in (1, 2):
        assert build(source, tmp_path / f"out{workers}", "--workers", workers).returncode == 0
    files = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out2").iterdir())
    for name in files:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name
    labels = open_split(tmp_path / "out1", "train").label
    assert (np.diff(labels) != 0).sum() > 20  # 2 if sorted; 2/3 of 59 neighbours are expected to differ


def test_a_build_again_is_finished_and_another_plan_is_refused(source, tmp_path):
    out = tmp_path / "out"
    build(source, out)
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "dataset.json").unlink()  # as if it had been stopped just before the end
    assert build(source, out).returncode == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content
    assert "out" in refused(build(source, out, "--seed", 5))


@pytest.mark.parametrize(("on_bad", "kept"), [("drop", 58), ("keep", 60)])
def test_bad_images_are_named_counted_and_left_out_or_kept(source, tmp_path, on_bad, kept):
    good = image(1)
    bad = {"n00000001_0.JPEG": good[: len(good) // 2], "n00000001_1.JPEG": b"not an image"}
    write_tar(source / "n00000001.tar", bad | {f"n00000001_{i}.JPEG": image(i) for i in range(2, A_CLASS)})
    text = refused(build(source, tmp_path / "fail"))
    assert "2 bad images in all" in text
    assert "--on-bad drop" in text
    result = build(source, tmp_path / on_bad, "--on-bad", on_bad)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout + result.stderr for name in ("n00000001_0", "n00000001_1"))
    assert len(open_split(tmp_path / on_bad, "train")) == kept


def _no_tars(source: Path) -> None:
    for path in source.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_tars, "source"),
        (lambda s: (s / "cats.tar").write_bytes((s / f"{WNIDS[0]}.tar").read_bytes()), "cats"),
        (lambda s: (s / f"{WNIDS[0]}.tar").write_bytes(b"junk" * 300), WNIDS[0]),
        (lambda s: write_tar(s / f"{WNIDS[0]}.tar", {}), WNIDS[0]),
        (lambda s: write_tar(s / f"{WNIDS[0]}.tar", {"../../x.JPEG": image(0)}), "../../x.JPEG"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line(source, tmp_path, damage, said):
    damage(source)
    assert said in refused(build(source, tmp_path / "out"))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_verify_names_the_damaged_sample(source, tmp_path):
    out = tmp_path / "out"
    build(source, out)
    assert command("verify", out).returncode == 0
    index = open_split(out, "train")
    shard = index.shard_path(7)
    content = bytearray(shard.read_bytes())
    content[int(index.offset[7]) + 5] ^= 1
    shard.write_bytes(content)
    result = command("verify", out)
    refused(result)
    assert index.key(7) in result.stdout
