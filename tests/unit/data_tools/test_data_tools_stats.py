"""`vitscale-data stats` on builds, indexed shards and bare indexes, against counts made another way."""

import json
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from builder_command import picture, refused, succeeded, vitscale_data, write_class_tars, write_tar
from hypothesis import given
from hypothesis import strategies as st

from data_tools.stats import effective_classes, gini
from vitscale.data.index import INDEX_SCHEMA, ShardFile, write_dataset_json, write_split

# The first two are among the 1,000 classes of ImageNet-1k, the last is not.
CLASSES = ("n01440764", "n01443537", "n00007846")


@pytest.fixture(scope="module")
def many_classes():
    """30 images of each of 24 classes, by wnid and name; all have the same bytes."""
    data = picture(0)
    return {f"n{c:08d}": {f"n{c:08d}_{i}.JPEG": data for i in range(30)} for c in range(24)}


def write_bare_index(folder, rows):
    """A dataset without shards; rows are (label, size, width, height, format)."""
    folder.mkdir()
    label, size, width, height, image_format = map(list, zip(*rows, strict=True))
    count = len(rows)
    columns = {
        "key": [f"k{i}" for i in range(count)],
        "shard": ["train-000000.tar"] * count,
        "offset": [512 * i for i in range(count)],
        "size": size,
        "label": label,
        "wnid": [CLASSES[one] for one in label],
        "width": width,
        "height": height,
        "format": image_format,
        "crc32": [None] * count,
    }
    table = pa.table(columns, schema=INDEX_SCHEMA)
    shards = [ShardFile(name="train-000000.tar", size_bytes=5000, samples=count)]
    files = write_split(folder, "train", CLASSES, table, shards)
    write_dataset_json(folder, seed=0, plan="", classes=CLASSES, splits={"train": files})
    return folder


@pytest.fixture
def bare_index(tmp_path):
    sizes = [100, 200, 300, 400, 500]
    rows = [(0, size, 2 * size, size, "jpeg") for size in sizes]
    return write_bare_index(tmp_path / "set", [*rows, (2, 60, 30, 900, "png"), (2, 7, 0, 0, "unknown")])


def tree_of(folder, *options):
    return json.loads(succeeded(vitscale_data("stats", folder, "--json", *options)).stdout)


def test_a_build_is_well_mixed_and_class_sorted_shards_are_not(many_classes, tmp_path):
    source = write_class_tars(tmp_path / "source", many_classes)
    succeeded(
        vitscale_data("build", "--source", "class-tars", source, "--out", tmp_path / "built", "--check", "header")
    )
    samples = {name: data for members in many_classes.values() for name, data in members.items()}
    (tmp_path / "sorted").mkdir()
    members = {}
    for name, data in samples.items():
        key = name.removesuffix(".JPEG")
        members |= {f"{key}.jpeg": data, f"{key}.cls": str(int(key[1:9])).encode()}
    write_tar(tmp_path / "sorted" / "train-000000.tar", members)
    words = ("index", tmp_path / "sorted" / "train-000000.tar", "--out", tmp_path / "indexed", "--workers", 1)
    succeeded(vitscale_data(*words))
    options = ("--batch", 48, "--lanes", 6, "--block", 16)
    built, indexed = (tree_of(tmp_path / folder, *options)["splits"]["train"] for folder in ("built", "indexed"))
    assert built["class_images"] == indexed["class_images"]
    assert built["mixing"]["score"] >= 0.98
    assert indexed["mixing"]["score"] < 0.6
    assert "too low" in succeeded(vitscale_data("stats", tmp_path / "indexed", *options)).stdout
    assert "too low" not in succeeded(vitscale_data("stats", tmp_path / "built", *options)).stdout


def test_what_an_index_holds_is_counted(bare_index):
    tree = tree_of(bare_index)
    assert tree["label_space"] is None
    train = tree["splits"]["train"]
    assert (train["samples"], train["shards"], train["shard_bytes"]) == (7, 1, 5000)
    assert train["image_bytes"] == 1567
    assert train["formats"] == {"jpeg": 5, "png": 1, "unknown": 1}
    assert (train["classes"], train["classes_present"]) == (3, 2)
    assert (train["class_images"]["min"], train["class_images"]["max"]) == (2, 5)
    assert train["size_bytes"]["median"] == 200


def test_images_that_cannot_be_read_have_no_size_in_pixels(bare_index):
    train = tree_of(bare_index)["splits"]["train"]
    assert train["unreadable"] == 1
    assert (train["short_edge_px"]["min"], train["short_edge_px"]["max"]) == (30, 500)
    assert train["megapixels"]["min"] == pytest.approx(0.02)


def test_a_split_without_a_readable_image_has_no_sizes_in_pixels(tmp_path):
    folder = write_bare_index(tmp_path / "set", [(0, 7, 0, 0, "unknown")])
    assert tree_of(folder)["splits"]["train"]["short_edge_px"] == {}
    (line,) = (line for line in vitscale_data("stats", folder).stdout.splitlines() if "short edge" in line)
    assert line.split()[3:] == ["-"] * 7


def test_a_label_space_counts_its_own_classes_alone(bare_index):
    tree = tree_of(bare_index, "--label-space", "in1k")
    assert tree["label_space"] == "in1k"
    train = tree["splits"]["train"]
    assert (train["samples"], train["classes"], train["classes_present"]) == (5, 1000, 1)
    assert train["formats"] == {"jpeg": 5, "png": 0, "unknown": 0}
    assert train["size_bytes"]["max"] == 500


def test_people_read_the_same_numbers_of_every_split(digits_dataset):
    printed = succeeded(vitscale_data("stats", digits_dataset)).stdout
    splits = tree_of(digits_dataset)["splits"]
    assert set(splits) == {"train", "val"}
    for name, split in splits.items():
        lines = printed[printed.index(f"\n{name}\n") :].splitlines()[2:]
        assert lines[0].split()[:2] == ["samples", str(split["samples"])]
    (only,) = tree_of(digits_dataset, "--split", "val")["splits"]
    assert only == "val"


def test_an_unknown_split_is_refused(bare_index):
    assert refused(vitscale_data("stats", bare_index, "--split", "test")).endswith("no split 'test': it has train")


def test_a_label_space_without_a_sample_is_refused(tmp_path):
    folder = write_bare_index(tmp_path / "set", [(2, 60, 30, 40, "png")])
    line = refused(vitscale_data("stats", folder, "--label-space", "in1k"))
    assert "no sample of split train has a class of in1k: name another label space" in line


def test_an_unknown_label_space_is_refused(bare_index):
    assert "did you mean in1k" in refused(vitscale_data("stats", bare_index, "--label-space", "in1"))


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    assert "finished `vitscale-data build`" in refused(vitscale_data("stats", tmp_path))


counts = st.lists(st.integers(1, 1000), min_size=1, max_size=20).map(np.array)


@given(counts)
def test_gini_is_half_the_mean_difference_over_the_mean(amounts):
    difference = np.mean([abs(int(a) - int(b)) for a, b in product(amounts, amounts)])
    assert gini(amounts) == pytest.approx(difference / (2 * amounts.mean()), abs=1e-12)


@given(counts)
def test_there_are_as_many_effective_classes_as_classes_only_if_they_are_equal(amounts):
    found = effective_classes(amounts)
    assert 1 - 1e-9 <= found <= len(amounts) + 1e-9
    assert effective_classes(np.full_like(amounts, 7)) == pytest.approx(len(amounts))
    one_bit = effective_classes(np.array([1, 1, 2]))  # entropy 1.5 bits
    assert one_bit == pytest.approx(2**1.5)
