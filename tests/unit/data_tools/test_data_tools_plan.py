"""Which image goes into which shard: against a slow plan made image by image."""

import hashlib
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.plan import MAX_KEY_BYTES, Division, lay_out
from data_tools.sources.listing import LISTING_SCHEMA, NO_SPLIT, OWN_FILE, TRAIN, VAL, Listing
from data_tools.ustar import MAX_FILE_BYTES
from vitscale.data.order import BUILD_SHUFFLE, BUILD_SPLIT, hash64
from vitscale.errors import ShardError

CLASSES = ("n00000001", "n00000002", "n00000003")


def listing(images, sizes=None, splits=None):
    """A listing of (wnid, name) pairs."""
    count = len(images)
    wnids, names = zip(*images, strict=True)
    columns = [
        pa.array(names),
        pa.array(wnids).dictionary_encode(),
        pa.array(splits or [NO_SPLIT] * count, pa.int8()),
        pa.array([OWN_FILE] * count, pa.int32()),
        pa.array(range(count), pa.int64()),
        pa.array(sizes or [1000] * count, pa.int64()),
    ]
    return Listing(Path("/source"), (), pa.table(columns, schema=LISTING_SCHEMA))


def division(**changes):
    plain = {
        "seed": 0,
        "val_fraction": 0.0,
        "val_list": None,
        "split_from_source": False,
        "shard_images": 4096,
        "shard_bytes": None,
    }
    return Division(**plain | changes)


def shards(layout):
    """Keys of every shard."""
    keys = layout.table["key"].to_pylist()
    return {shard.name: [keys[row] for row in shard.rows] for shard in layout.shards}


def slow_plan(images, seed, val_fraction, shard_images):
    """The same shards, image by image."""
    stems = [PurePosixPath(name).stem.replace(".", "_") for _, name in images]
    keys = [f"{wnid}_{stem}" if stems.count(stem) > 1 else stem for (wnid, _), stem in zip(images, stems, strict=True)]

    def rank(key, purpose):
        word = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        return int(hash64(seed, purpose, np.uint64(word)))

    val = set()
    for wnid, count in Counter(wnid for wnid, _ in images).items():
        own = sorted(
            (key for key, (w, _) in zip(keys, images, strict=True) if w == wnid), key=lambda k: rank(k, BUILD_SPLIT)
        )
        wanted = count if val_fraction == 1 else min(int(val_fraction * count + 0.5), count - 1)
        val |= set(own[:wanted])
    order = sorted(keys, key=lambda key: rank(key, BUILD_SHUFFLE))
    parts = {"train": [key for key in order if key not in val], "val": [key for key in order if key in val]}
    return {
        f"{split}-{number:06d}.tar": part[first : first + shard_images]
        for split, part in parts.items()
        for number, first in enumerate(range(0, len(part), shard_images))
    }


names = st.from_regex(r"(a/|b/)?[xyz.]{1,3}(\.jpg|\.tar\.gz)?", fullmatch=True).filter(
    lambda name: not name.endswith(".")  # of these Python has changed its mind
)


@given(
    images=st.lists(st.tuples(st.sampled_from(CLASSES), st.integers(0, 30)), min_size=1, max_size=40, unique=True),
    seed=st.integers(0, 3),
    val_fraction=st.sampled_from([0.0, 0.3, 1.0]),
    shard_images=st.integers(1, 9),
)
def test_shards_are_those_of_the_slow_plan(images, seed, val_fraction, shard_images):
    images = [(wnid, f"{wnid}/x.{number}.JPEG") for wnid, number in images]
    expected = slow_plan(images, seed, val_fraction, shard_images)
    division_ = division(seed=seed, val_fraction=val_fraction, shard_images=shard_images)
    if val_fraction and not any(name.startswith("val") for name in expected):
        with pytest.raises(ShardError, match="leaves no image for val"):
            lay_out(listing(images), CLASSES, division_)
        return
    layout = lay_out(listing(images), CLASSES, division_)
    assert shards(layout) == expected
    assert layout.table["label"].to_pylist() == [CLASSES.index(wnid) for wnid, _ in images]


@settings(max_examples=50)
@given(name=names)
def test_a_key_is_the_stem_without_dots(name):
    layout = lay_out(listing([("n00000001", name)]), CLASSES, division())
    assert layout.table["key"].to_pylist() == [PurePosixPath(name).stem.replace(".", "_")]


def test_two_images_of_one_key_are_refused():
    with pytest.raises(ShardError, match=r"b/x\.jpg: has the same key n00000001_x as a/x\.jpg"):
        lay_out(
            listing([("n00000001", "a/x.jpg"), ("n00000002", "y.jpg"), ("n00000001", "b/x.jpg")]), CLASSES, division()
        )


def test_names_and_images_that_no_shard_can_hold_are_refused():
    longest = "x" * MAX_KEY_BYTES
    lay_out(listing([("n00000001", f"{longest}.jpg")]), CLASSES, division())
    with pytest.raises(ShardError, match=f"{longest}x.jpg: the name is longer than {MAX_KEY_BYTES} bytes"):
        lay_out(listing([("n00000001", f"{longest}x.jpg")]), CLASSES, division())
    with pytest.raises(ShardError, match=r"/source/y\.jpg: has 8589934592 bytes, more"):
        lay_out(listing([("n00000001", "y.jpg")], sizes=[MAX_FILE_BYTES + 1]), CLASSES, division())


def test_images_outside_the_classes_are_counted_and_labels_follow_the_list():
    images = [("n00000002", "a.jpg"), ("n00000009", "b.jpg"), ("n00000001", "c.jpg"), ("n00000009", "d.jpg")]
    layout = lay_out(listing(images), ("n00000002", "n00000007", "n00000001"), division())
    assert layout.outside == {"n00000009": 2}
    assert layout.table.select(["key", "label"]).to_pylist() == [{"key": "a", "label": 0}, {"key": "c", "label": 2}]
    with pytest.raises(ShardError, match="no image has one of the 1 classes"):
        lay_out(listing(images), ("n00000007",), division())


def test_shards_by_bytes_are_near_their_size_and_hold_every_image_once():
    sizes = np.random.default_rng(0).integers(1, 40_000, 500).tolist()
    images = [("n00000001", f"{number}.jpg") for number in range(500)]
    whole = shards(lay_out(listing(images), CLASSES, division(shard_images=500)))["train-000000.tar"]
    cut = shards(lay_out(listing(images, sizes), CLASSES, division(shard_bytes=300_000)))
    assert [key for part in cut.values() for key in part] == whole
    written = [sum(-(-sizes[int(key)] // 512) * 512 + 5 * 512 for key in part) for part in cut.values()]
    assert all(abs(size - 300_000) < 50_000 for size in written[:-1])
    assert written[-1] < 300_000 + 50_000
    tiny = shards(lay_out(listing(images, sizes), CLASSES, division(shard_bytes=1)))
    assert [len(part) for part in tiny.values()] == [1] * 500


def test_a_list_or_the_source_chooses_val():
    images = [
        (wnid, f"{wnid}/{name}") for wnid in CLASSES for name in (f"{wnid}_1.JPEG", f"{wnid}_2.JPEG", "same.JPEG")
    ]
    lines = ["n00000001/n00000001_2.JPEG 0", "", "n00000002_1", "n00000003/same.JPEG", "n00000009/other.JPEG"]
    layout = lay_out(listing(images), CLASSES, division(val_list=lines))
    assert set(shards(layout)["val-000000.tar"]) == {"n00000001_2", "n00000002_1", "n00000003_same"}
    with pytest.raises(ShardError, match="names no image of the source"):
        lay_out(listing(images), CLASSES, division(val_list=["n00000001/other.JPEG"]))

    layout = lay_out(listing(images, splits=[VAL, TRAIN, NO_SPLIT] * 3), CLASSES, division(split_from_source=True))
    assert set(shards(layout)["val-000000.tar"]) == {f"{wnid}_1" for wnid in CLASSES}
    with pytest.raises(ShardError, match="the source has no val"):
        lay_out(listing(images, splits=[TRAIN] * 9), CLASSES, division(split_from_source=True))
