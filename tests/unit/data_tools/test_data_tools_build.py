"""The builder through its command: what it writes, that webdataset reads the same, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from builder_command import (
    A_CLASS,
    WNIDS,
    content,
    picture,
    pictures,
    refused,
    succeeded,
    vitscale_data,
    write_class_tars,
    write_tar,
)

from data_tools.parts import claim
from vitscale.data.index import read_dataset, read_index
from vitscale.data.split import SplitIndex, open_split


@pytest.fixture
def source(tmp_path):
    return write_class_tars(tmp_path / "source", pictures())


def build(source, out, *options):
    return vitscale_data("build", "--source", "class-tars", source, "--out", out, "--shard-images", 16, *options)


def samples(index: SplitIndex) -> dict[str, tuple[int, bytes]]:
    found = {}
    for row in range(len(index)):
        with Path(index.shard_path(row)).open("rb") as shard:
            shard.seek(int(index.offset[row]))
            found[index.key(row)] = int(index.label[row]), shard.read(int(index.size[row]))
    return found


def test_webdataset_finds_what_the_index_says_and_no_image_is_lost(source, tmp_path):
    out = tmp_path / "out"
    succeeded(build(source, out, "--val-fraction", 0.25))
    classes = read_dataset(out).classes
    assert classes == tuple(sorted(WNIDS))
    whole = {}
    for split in ("train", "val"):
        indexed = samples(open_split(out, split))
        shards = sorted(str(path) for path in out.glob(f"{split}-*.tar"))
        read = {}
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            (image,) = (sample[extension] for extension in ("jpeg", "jpg", "png") if extension in sample)
            assert classes[int(sample["cls"])] == sample["wnid"].decode()
            read[sample["__key__"]] = int(sample["cls"]), image
        assert read == indexed
        assert not whole.keys() & read.keys()
        whole |= read
    originals = {
        name.removesuffix(".JPEG"): (classes.index(wnid), data)
        for wnid, members in pictures().items()
        for name, data in members.items()
    }
    assert whole == originals
    assert np.bincount(open_split(out, "val").label).tolist() == [5, 5, 5]


def test_the_index_tells_every_image(source, tmp_path):
    out = tmp_path / "out"
    succeeded(build(source, out, "--check", "header"))
    rows = read_index(out, read_dataset(out), "train", ("key", "wnid", "width", "height", "format")).to_pylist()
    assert {(row["width"], row["height"]) for row in rows} == {(20, 24)}
    assert {row["key"] for row in rows if row["format"] == "png"} == {f"{wnid}_0" for wnid in WNIDS}
    assert all(row["key"].startswith(row["wnid"]) for row in rows)


def test_classes_are_mixed(source, tmp_path):
    succeeded(build(source, tmp_path / "out"))
    labels = open_split(tmp_path / "out", "train").label
    assert (np.diff(labels) != 0).sum() > 20  # 2 if sorted; 2/3 of 59 neighbours are expected to differ


def test_the_bytes_do_not_depend_on_workers_or_parts(source, tmp_path):
    for workers in (1, 3):
        succeeded(build(source, tmp_path / f"{workers}", "--val-fraction", 0.2, "--workers", workers))
    parts = tmp_path / "parts"
    options = ("--source", "class-tars", source, "--shard-images", 16, "--val-fraction", 0.2)
    succeeded(vitscale_data("plan", "--out", parts, *options))
    assert "4 of 4 shards are not finished" in refused(vitscale_data("merge", parts))
    for part in ("2/3", "1/3"):
        assert (
            f"vitscale-data merge {parts}" in succeeded(vitscale_data("build", "--out", parts, "--part", part)).stdout
        )
    assert "1 of 4 shards are not finished, the first is train-000002.tar" in refused(vitscale_data("merge", parts))
    succeeded(vitscale_data("build", "--out", parts, "--part", "3/3", *options))
    succeeded(vitscale_data("merge", parts))
    assert content(tmp_path / "1") == content(tmp_path / "3") == content(parts)


def test_a_build_again_is_finished_and_another_plan_is_refused(source, tmp_path):
    out = tmp_path / "out"
    succeeded(build(source, out))
    built = content(out)
    assert "finished" in succeeded(build(source, out)).stdout
    (out / "dataset.json").unlink()  # as if it had been stopped just before the end
    assert "(0 written now)" in succeeded(build(source, out)).stdout
    assert content(out) == built
    assert f"{out}: holds another finished build, planned with seed 0, not 5" in refused(
        build(source, out, "--seed", 5)
    )
    (out / "dataset.json").unlink()
    assert f"{out}: holds an unfinished build, planned with seed 0, not 5" in refused(build(source, out, "--seed", 5))


@pytest.fixture
def damaged(source):
    good = picture(1)
    bad = {"n00000001_0.JPEG": good[: len(good) // 2], "n00000001_1.JPEG": b"not an image"}
    write_tar(source / "n00000001.tar", bad | {f"n00000001_{i}.JPEG": picture(i) for i in range(2, A_CLASS)})
    return source


@pytest.mark.parametrize(("on_bad", "kept"), [("drop", 58), ("keep", 60)])
def test_bad_images_are_named_counted_and_left_out_or_kept(damaged, tmp_path, on_bad, kept):
    out = tmp_path / "out"
    text = refused(build(damaged, out))
    assert "2 bad images in all" in text
    assert "--on-bad drop" in text
    result = succeeded(build(damaged, out, "--on-bad", on_bad))  # goes on with the shards that the first one wrote
    assert "4 shards (4 written now)" not in result.stdout
    assert all(name in result.stdout for name in ("n00000001_0", "n00000001_1"))
    index = read_index(out, read_dataset(out), "train", ("key", "width"))
    assert len(index) == kept
    rejects = {row.pop("key"): row for row in pq.read_table(out / "rejects.parquet").to_pylist()}
    assert rejects.keys() == {"n00000001_0", "n00000001_1"}
    row = rejects["n00000001_1"]
    assert "not an image" in row.pop("reason")
    assert row.pop("shard").startswith("train-00000")
    assert row == {"source": "n00000001.tar: n00000001_1.JPEG", "wnid": "n00000001"}
    fresh = tmp_path / "fresh"
    succeeded(build(damaged, fresh, "--on-bad", on_bad))
    assert content(fresh) == content(out)
    (out / "dataset.json").unlink()
    assert f"{kept} images, 4 shards (0 written now)" in succeeded(build(damaged, out, "--on-bad", on_bad)).stdout
    other = {"drop": "keep", "keep": "drop"}[on_bad]
    assert f"with --on-bad {on_bad}" in refused(build(damaged, out, "--on-bad", other))


def test_parts_under_two_rules_for_bad_images_are_refused(damaged, tmp_path):
    out = tmp_path / "out"
    succeeded(vitscale_data("plan", "--source", "class-tars", damaged, "--out", out, "--shard-images", 1))
    succeeded(vitscale_data("build", "--out", out, "--on-bad", "keep"))
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    (out / "dataset.json").unlink()
    number = int(rejects[0]["shard"][6:12])
    succeeded(vitscale_data("build", "--out", out, "--on-bad", "drop", "--part", f"{number + 1}/60"))
    assert "--on-bad drop and keep" in refused(vitscale_data("merge", out))


def test_a_shard_without_images_is_left_out_and_a_dataset_without_any_is_refused(tmp_path):
    source = write_class_tars(tmp_path / "source", {WNIDS[0]: {"a.JPEG": b"bad", "b.JPEG": picture(0)}})
    options = ("--source", "class-tars", source, "--shard-images", 1, "--on-bad", "drop")
    succeeded(vitscale_data("build", "--out", tmp_path / "out", *options))
    (shard,) = read_dataset(tmp_path / "out").splits["train"].shards
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == [shard.name]
    write_tar(source / f"{WNIDS[0]}.tar", {"a.JPEG": b"bad"})
    assert "every image was rejected" in refused(vitscale_data("build", "--out", tmp_path / "none", *options))


def test_of_many_bad_images_the_first_are_named(tmp_path):
    images = {f"{number}.JPEG": b"bad" for number in range(30)}
    source = write_class_tars(tmp_path / "source", {WNIDS[0]: {**images, "good.JPEG": picture(0)}})
    text = succeeded(build(source, tmp_path / "out", "--on-bad", "drop")).stdout
    assert text.count("left out: n00000002.tar: ") == 20
    assert "10 more: see rejects.parquet" in text
    assert pq.read_metadata(tmp_path / "out" / "rejects.parquet").num_rows == 30


def test_copies_of_a_reference_set_are_left_out(source, tmp_path):
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "known.jpg").write_bytes(pictures()["n00000003"]["n00000003_7.JPEG"])
    result = succeeded(build(source, tmp_path / "out", "--leakage", reference, "--leakage-distance", 0))
    assert "1 leaked" in result.stdout
    (reject,) = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert reject["key"] == "n00000003_7"
    assert "known.jpg" in reject["reason"]


def test_json_is_one_object_and_nothing_else(source, tmp_path):
    out = tmp_path / "out"
    options = ("--source", "class-tars", source, "--out", out, "--json")
    planned = json.loads(succeeded(vitscale_data("plan", *options)).stdout)
    assert planned["images"] == 60
    built = json.loads(succeeded(vitscale_data("build", *options)).stdout)
    assert built["finished"]
    assert built["images"] == 60
    assert built["shards_written"] == built["shards"] == 1
    merged = json.loads(succeeded(vitscale_data("merge", out, "--json")).stdout)
    assert merged["images"] == {"train": 60}
    assert merged["plan"] == planned["plan"]


def test_a_plan_tells_what_comes_next(source, tmp_path):
    result = succeeded(vitscale_data("plan", "--source", "class-tars", source, "--out", tmp_path / "out"))
    assert (
        f"3 classes, 60 images in 1 shards, 0 images outside the classes; next: vitscale-data build --out {tmp_path}"
        in (result.stdout)
    )


def test_two_builders_on_one_folder_are_refused(source, tmp_path):
    out = tmp_path / "out"
    with claim(out):
        assert "another builder works here" in refused(build(source, out))
    succeeded(build(source, out))


def test_a_source_that_changed_since_it_was_planned_is_refused(source, tmp_path):
    out = tmp_path / "out"
    succeeded(vitscale_data("plan", "--source", "class-tars", source, "--out", out))
    (source / "n00000001.tar").unlink()
    assert "n00000001.tar: is missing or has another size" in refused(vitscale_data("build", "--out", out))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / "plan.json").write_text("{}"), "plan.json: damaged"),
        (lambda out: (out / "plan.parquet").write_bytes(b"PAR1"), "plan.json: damaged"),
        (lambda out: (out / "notes.txt").write_text("mine"), "holds notes.txt"),
    ],
)
def test_a_folder_that_cannot_take_the_build_is_one_line(source, tmp_path, damage, said):
    out = tmp_path / "out"
    succeeded(vitscale_data("plan", "--source", "class-tars", source, "--out", out))
    damage(out)
    assert said in refused(vitscale_data("build", "--out", out))


def test_options_that_do_not_fit_together_are_one_line(source, tmp_path):
    out = tmp_path / "out"
    assert "holds no plan" in refused(vitscale_data("build", "--out", out))
    assert "holds no plan" in refused(vitscale_data("merge", out))
    assert "holds no plan" in refused(build(source, out, "--part", "1/2"))
    assert "--seed: belongs to the plan" in refused(vitscale_data("build", "--out", out, "--seed", 1))
    assert "choose one of them" in refused(build(source, out, "--val-fraction", 0.1, "--split-from-source"))
    assert "are for --source parquet" in refused(build(source, out, "--image-column", "image"))
    assert "is for --source parquet and shards" in refused(build(source, out, "--source-classes", "in1k"))
    assert "--val-list cannot be read" in refused(build(source, out, "--val-list", tmp_path / "none"))
    (out / "dataset.json").write_text("{}")
    assert "holds another finished dataset" in refused(build(source, out))


def test_an_out_that_is_a_file_is_one_line(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path}/file: cannot be built" in refused(build(source, tmp_path / "file"))
