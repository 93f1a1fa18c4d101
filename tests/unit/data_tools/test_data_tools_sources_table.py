"""The source `parquet`: tables as `datasets` writes them, and others."""

import json

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from builder_command import WNIDS, content, picture, pictures, refused, succeeded, vitscale_data, write_class_tars

from vitscale.data.split import open_split

CLASSES = sorted(WNIDS)
IMAGES = [(wnid, name, data) for wnid, images in pictures().items() for name, data in images.items()]


def build(source, out, *options):
    return vitscale_data("build", "--source", "parquet", source, "--out", out, "--shard-images", 16, *options)


def shards(out):
    return {name: data for name, data in content(out).items() if name.endswith((".tar", "train.parquet"))}


def as_datasets_writes(images):
    """Struct images, numeric labels, and their names in the metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": [{"bytes": data, "path": name} for _, name, data in images],
            "label": [CLASSES.index(wnid) for wnid, _, _ in images],
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def as_binary(images):
    """Plain bytes beside their wnids."""
    return pa.table({"jpg": pa.array([data for *_, data in images]), "wnid": [wnid for wnid, *_ in images]})


def write_stream(table, path):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "parquet": lambda table, path: pq.write_table(table, path, row_group_size=7),
    "feather": lambda table, path: pyarrow.feather.write_feather(table, path, chunksize=11),
    "arrow": write_stream,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_tables_give_what_class_tars_give(tmp_path, suffix):
    succeeded(
        vitscale_data(
            "build", "--source", "class-tars", write_class_tars(tmp_path / "tars", pictures()),
            "--out", tmp_path / "expected", "--shard-images", 16,
        )
    )  # fmt: skip
    (tmp_path / "tables").mkdir()
    WRITERS[suffix](as_datasets_writes(IMAGES[:25]), tmp_path / "tables" / f"a.{suffix}")
    WRITERS[suffix](as_datasets_writes(IMAGES[25:]), tmp_path / "tables" / f"b.{suffix}")
    succeeded(build(tmp_path / "tables", tmp_path / "out", "--workers", 2 if suffix == "parquet" else 1))
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    assert not (tmp_path / "out" / "spool").exists()


def test_images_without_a_name_are_named_by_their_place(tmp_path):
    pq.write_table(as_binary(IMAGES[:3]), tmp_path / "x.parquet")
    succeeded(build(tmp_path / "x.parquet", tmp_path / "out"))
    index = open_split(tmp_path / "out", "train")
    assert set(index.keys.to_pylist()) == {"000000_00000000", "000000_00000001", "000000_00000002"}


def test_files_tell_the_split(tmp_path):
    for name, images in (("train-00000-of-00001", IMAGES[:30]), ("validation-00000-of-00001", IMAGES[30:])):
        pq.write_table(as_datasets_writes(images), tmp_path / f"{name}.parquet")
    succeeded(build(tmp_path, tmp_path / "out", "--split-from-source"))
    assert len(open_split(tmp_path / "out", "val")) == 30


def test_a_spool_that_was_stopped_goes_on(tmp_path):
    (tmp_path / "tables").mkdir()
    pq.write_table(as_datasets_writes(IMAGES[:30]), tmp_path / "tables" / "a.parquet")
    good = as_datasets_writes(IMAGES[30:])
    pq.write_table(good.set_column(1, "label", pa.array([9] * 30)), tmp_path / "tables" / "b.parquet")
    assert "label 9, with 3 class names" in refused(build(tmp_path / "tables", tmp_path / "out"))
    first = (tmp_path / "out" / "spool" / "000000.tar").stat().st_ino
    pq.write_table(good, tmp_path / "tables" / "b.parquet")
    succeeded(build(tmp_path / "tables", tmp_path / "out", "--keep-spool"))
    assert (tmp_path / "out" / "spool" / "000000.tar").stat().st_ino == first
    assert len(open_split(tmp_path / "out", "train")) == 60


def table(**columns):
    return pa.table({"image": pa.array([picture(0)]), "label": ["n00000001"], **columns})


@pytest.mark.parametrize(
    ("content_", "options", "said"),
    [
        (table(label=[3]), (), "label 3, with no class names"),
        (table(label=["tench, Tinca tinca"]), (), "class 'tench, Tinca tinca' is no wnid"),
        (table(label=pa.array([None], pa.string())), (), "class None is no wnid"),
        (table(), ("--image-column", "picture"), "no image column picture"),
        (table(), ("--label-column", "kind"), "no label column kind"),
        (table().drop(["image"]), (), "no image column"),
        (table().drop(["label"]), (), "no label column"),
        (table(image=[{"bytes": None, "path": "a.jpg"}]), (), "holds a path, a.jpg, in place of the image"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path, content_, options, said):
    pq.write_table(content_, tmp_path / "x.parquet")
    assert said in refused(build(tmp_path / "x.parquet", tmp_path / "out", *options))
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_damaged_file_is_one_line(tmp_path, suffix):
    (tmp_path / f"x.{suffix}").write_bytes(b"junk" * 100)
    assert "not a readable table" in refused(build(tmp_path / f"x.{suffix}", tmp_path / "out"))


def test_a_file_damaged_inside_is_one_line(tmp_path):
    WRITERS["parquet"](as_datasets_writes(IMAGES), tmp_path / "x.parquet")
    whole = bytearray((tmp_path / "x.parquet").read_bytes())
    whole[4:2000] = bytes(1996)
    (tmp_path / "x.parquet").write_bytes(whole)
    assert "not a readable table" in refused(build(tmp_path / "x.parquet", tmp_path / "out"))


def test_a_folder_without_tables_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no .parquet" in refused(build(tmp_path / "empty", tmp_path / "out"))


def test_an_image_of_no_bytes_is_a_bad_image(tmp_path):
    pq.write_table(table(image=pa.array([None], pa.binary())), tmp_path / "x.parquet")
    assert "1 bad images in all" in refused(build(tmp_path / "x.parquet", tmp_path / "out"))
