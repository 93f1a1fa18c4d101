import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from builder_command import write_tar
from micro_data import jpeg

from vitscale.config import BatchSplit, DataSection, StreamSection
from vitscale.data.augment import Augmentation, crop_box, draw_crops
from vitscale.data.batch import TrainBatch
from vitscale.data.decode import crop_resize, decode
from vitscale.data.loader import TrainLoader
from vitscale.data.stream import Stream, StreamRecipe
from vitscale.errors import ConfigError, ShardError

SPLIT = BatchSplit(global_batch=16, micro_batch=8, grad_accum=1, world_size=2)


@pytest.fixture
def shards(tmp_path: Path, images: list[bytes]) -> str:
    """Four shards of ten images; image i has the label i mod 3."""
    for number in range(4):
        members = {}
        for i in range(10 * number, 10 * number + 10):
            members |= {f"image{i}.jpg": images[i], f"image{i}.cls": str(i % 3).encode(), f"image{i}.json": b"{}"}
        write_tar(tmp_path / f"{number:06d}.tar", members)
    return f"{tmp_path}/{{000000..000003}}.tar"


def section_of(shards: str, **more: object) -> DataSection:
    stream = {"shards": shards, "num_classes": 3, "samples": 40, "shuffle_buffer": 5}
    return DataSection.model_validate({"stream": stream, "workers": 0, "bad_sample_budget": 50, **more})


def train(section: DataSection, count: int, rank: int = 0, start: int = 0, seed: int = 5) -> list[TrainBatch]:
    assert section.stream is not None
    augmentation = Augmentation(section.augment, seed, 8, section.flip, section.mean, section.std)
    loader = TrainLoader(StreamRecipe(section, augmentation, SPLIT, rank, start, Stream(section.stream, seed)))
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def test_images_labels_and_augmentation_belong_together(shards: str, images: list[bytes]) -> None:
    section = section_of(shards)
    for batch in train(section, 4):
        for position, label, image in zip(batch.positions.tolist(), batch.labels.tolist(), batch.images, strict=True):
            box = crop_box(draw_crops(5, np.array([position]))[0], 20, 26, section.crop_scale, section.crop_ratio)
            fits = [i for i in range(40) if torch.equal(crop_resize(decode(images[i]), box, 8, "bilinear"), image)]
            assert label in {i % 3 for i in fits}
        assert batch.samples.tolist() == [-1] * 8


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_restarts_draw_apart_and_a_start_repeats_itself(shards: str, workers: int) -> None:
    section = section_of(shards, workers=workers)
    first = train(section, 3)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, train(section, 3), strict=True))
    others = (train(section, 3, rank=1), train(section, 3, start=16), train(section, 3, seed=6))
    for other in others:
        assert any(not torch.equal(a.labels, b.labels) for a, b in zip(first, other, strict=True))
    assert [batch.cursor.position for batch in first] == [16, 32, 48]


def test_bad_samples_are_passed_over_and_named(tmp_path: Path) -> None:
    sound = {f"good{i}.jpg": jpeg(i) for i in range(6)} | {f"good{i}.cls": b"1" for i in range(6)}
    write_tar(tmp_path / "a.tar", {**dict(sorted(sound.items())), "bad.jpg": b"no image", "bad.cls": b"2"})
    substitutions = [s for batch in train(section_of(str(tmp_path / "a.tar")), 6) for s in batch.substitutions]
    assert {s.key for s in substitutions} == {"bad"}
    assert all(s.replaced_by.startswith("good") and s.shard.endswith("a.tar") for s in substitutions)
    assert "not an image" in substitutions[0].reason


CANARY = """
import pathlib
class Canary:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path({path!r}),)
"""


@pytest.mark.fault(32)
def test_pickles_and_pipes_are_never_executed(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    space: dict[str, type] = {}
    exec(CANARY.format(path=str(touched)), space)
    payload = pickle.dumps(space["Canary"]())
    members = {
        f"{i}.{kind}": data
        for i in range(9)
        for kind, data in {"pkl": payload, "pyd": payload, "pth": payload, "jpg": jpeg(i), "cls": b"0"}.items()
    }
    write_tar(tmp_path / "a.tar", members)
    assert train(section_of(str(tmp_path / "a.tar")), 2)[0].labels.tolist() == [0] * 8
    with pytest.raises(ConfigError, match="commands are never executed"):
        Stream(StreamSection(shards=f"pipe:touch {touched}", num_classes=3, samples=9), 0)
    for pattern in (f"{tmp_path}/a.tar|touch {touched}", f"http://127.0.0.1:1/';touch {touched};'a.tar"):
        remote = {"patience_s": 0.1, "longest_pause_s": 0.1}
        with pytest.raises(ShardError):
            train(section_of(pattern, remote=remote), 1)
    assert not touched.exists()
    pickle.loads(payload)
    assert touched.exists(), "the canary would have sung"


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"a.jpg": jpeg(0), "a.cls": b"3"}, r"a\.tar: sample a: label 3 is none of the 3 classes"),
        ({"a.jpg": jpeg(0)}, r"a\.tar: sample a: no label in \.cls: each sample needs a number"),
        ({"a.jpg": jpeg(0), "a.cls": b"cat"}, r"a\.tar: sample a: 'cat' in \.cls: each sample needs a number"),
        (
            {"a.txt": b"hello", "a.cls": b"0"},
            r"10 samples in a row are bad, a the last \(it holds no image, only cls, txt\)",
        ),
    ],
)
def test_shards_that_cannot_be_trained_on_are_one_line(tmp_path: Path, members: dict[str, bytes], told: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ShardError, match=told) as raised:
        train(section_of(str(tmp_path / "a.tar")), 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, b"garbage" * 200])
def test_a_shard_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content:
        (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"a\.tar: cannot be read") as raised:
        train(section_of(str(tmp_path / "a.tar")), 1)
    assert "\n" not in str(raised.value)


def test_what_the_trainer_asks_of_a_stream(shards: str) -> None:
    section = section_of(shards).stream
    assert section is not None
    stream = Stream(section, 5)
    assert (stream.epoch_images, stream.classes) == (40, ("class-00000", "class-00001", "class-00002"))
    assert stream.cursor(8).position == 8
    assert stream.cursor(8) != Stream(section.model_copy(update={"shards": "other.tar"}), 5).cursor(8)
    assert np.unique(stream.classes).size == 3
