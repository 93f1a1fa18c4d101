import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import webdataset

from vitscale.bench.data import (
    DataBench,
    distinct_classes,
    machine,
    order_ms,
    read_traffic,
    report,
    work_folder,
)
from vitscale.bench.loaders import (
    LOADERS,
    OURS,
    Photos,
    available_loaders,
    compare_loaders,
    in_a_fresh_process,
    speed_of,
    write_mds,
)
from vitscale.bench.photo_dataset import CLASSES, write_long_index, write_photo_dataset
from vitscale.bench.resume import LongRun, first_batch, memory_in_training, seconds_to_open
from vitscale.config import BatchSplit
from vitscale.data.order import Order
from vitscale.data.split import SplitIndex, open_split

IMAGES, SHARD_IMAGES, SAMPLES = 48, 16, 20_000


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_dataset(tmp_path_factory.mktemp("bench") / f"photos-{IMAGES}", IMAGES, SHARD_IMAGES, distinct=2)


@pytest.fixture(scope="module")
def long_index(photos: Path) -> Path:
    return write_long_index(photos.parent / f"index-{SAMPLES}", photos, SAMPLES)


@pytest.fixture
def bench(photos: Path, long_index: Path) -> DataBench:
    said: list[str] = []
    return DataBench(
        photos.parent, IMAGES, SHARD_IMAGES, SAMPLES, workers=1, rounds=1, seconds=0, batches=20, say=said.append
    )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh one takes seconds to import what it needs."""
    for module in ("loaders", "data"):
        monkeypatch.setattr(f"vitscale.bench.{module}.in_a_fresh_process", lambda function, *words: function(*words))


def bytes_of(index: SplitIndex, row: int) -> bytes:
    return Path(index.shard_path(row)).read_bytes()[index.offset[row] :][: index.size[row]]


def test_photographs_are_a_dataset_that_webdataset_reads_alike(photos: Path) -> None:
    index = open_split(photos, "train")
    assert len(index) == IMAGES
    assert len(index.shards) == 3
    shards = sorted(map(str, photos.glob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [index.key(row) for row in range(IMAGES)]
    for row, sample in enumerate(samples):
        assert sample["jpeg"] == bytes_of(index, row)
        assert int(sample["cls"]) == index.label[row]
        assert sample["wnid"].decode() == CLASSES[index.label[row]]
        assert 70_000 < len(sample["jpeg"]) <= 98_000
        assert simplejpeg.decode_jpeg_header(sample["jpeg"])[:2] == (350, 400)


def test_every_row_of_a_long_index_is_one_of_the_photographs(photos: Path, long_index: Path) -> None:
    real, index = open_split(photos, "train"), open_split(long_index, "train")
    assert len(index) == SAMPLES
    assert len(set(index.keys.to_pylist())) == SAMPLES
    assert len(np.unique(index.label)) == len(CLASSES)
    for row in (0, 47, 48, SAMPLES - 1):
        assert bytes_of(index, row) == bytes_of(real, row % IMAGES)
        assert index.crc32[row] == real.crc32[row % IMAGES]
        assert index.key(row) == f"{CLASSES[index.label[row]]}_{row}"


@pytest.mark.parametrize("form", ["uint8", "float32"])
@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_gives_batches_in_both_forms(name: str, form: str, photos: Path, tmp_path: Path) -> None:
    libraries, open_loader = LOADERS[name]
    for library in libraries:
        pytest.importorskip(library)
    mds = None
    if "streaming" in libraries:
        write_mds(photos, mds := tmp_path / "mds")
    batches = open_loader(Photos(photos, mds, batch=8, workers=0), form)
    # More than an epoch: all go on without end.
    for _ in range(8):
        images = next(batches)
        assert images.shape == (8, 3, 224, 224)
        assert images.dtype == getattr(torch, form)
    low, high = (0, 255) if form == "uint8" else (-1, 1)
    assert images.min() >= low
    assert images.max() <= high
    assert images.float().std() > 0.1 * (high - low)
    batches.close()


@pytest.mark.usefixtures("in_this_process")
def test_loaders_take_turns_and_are_compared_form_by_form(photos: Path) -> None:
    others = ["webdataset + torchvision"]
    said: list[str] = []
    rates = list(compare_loaders(Photos(photos, None, batch=8, workers=0), [OURS, *others], 1, 0.0, said.append))
    turns = [(rate.form, rate.loader) for rate in rates]
    assert turns == [(form, name) for form in ("uint8", "float32") for name in (OURS, *others)]
    assert said == [f"{form}: {name}" for form, name in turns]
    for ours, other in (rates[:2], rates[2:]):
        assert ours.ours_over_it == ours.ours_over_it_cpu == 1
        assert other.ours_over_it == pytest.approx(ours.images_per_s / other.images_per_s)
        assert other.ours_over_it_cpu == pytest.approx(other.cpu_ms / ours.cpu_ms)


def test_a_fresh_process_is_another_one_with_one_thread() -> None:
    assert in_a_fresh_process(os.getppid) == os.getpid()
    assert in_a_fresh_process(torch.get_num_threads) == 1


def test_a_turn_ends_after_its_seconds(photos: Path) -> None:
    speed = speed_of(OURS, Photos(photos, None, batch=2, workers=0), "uint8", 0.05)
    assert speed.images_per_s > 0
    assert speed.cpu_ms > 0


def test_loaders_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available_loaders() == [OURS]


def test_a_resumed_run_starts_in_the_middle_and_reads_nothing_else(long_index: Path) -> None:
    run = LongRun(long_index, workers=0, lanes=64, world_size=4, micro_batch=16, read_ahead_mb=1)
    recipe = run.recipe()
    assert recipe.start_position == SAMPLES // 64 // 2 * 64
    assert recipe.split == BatchSplit(64, 16, 1, 4)
    found = first_batch(run, server_runs=False)
    assert found.seconds > 0
    # The batch itself and one window of read-ahead, which is one request where a request is larger than the limit.
    assert found.batch_bytes > 16 * 70_000
    assert found.read_bytes <= 2 * found.batch_bytes + 16 * 4096


def test_a_long_index_is_opened(long_index: Path) -> None:
    assert seconds_to_open(long_index) > 0


def test_memory_of_trainer_and_workers_is_seen(long_index: Path) -> None:
    run = LongRun(long_index, workers=2, lanes=64, world_size=4, micro_batch=16, read_ahead_mb=16)
    found = memory_in_training(run, batches=8, every=2)
    assert [memory.process for memory in found] == ["trainer", "worker 1", "worker 2"]
    for memory in found:
        assert min(memory.own_bytes) > 1 << 20
        size = open_split(long_index, "train").mapped.stat().st_size
        assert max(memory.index_bytes) <= size + 4096
    # The trainer looks at no row.
    assert min(found[1].index_bytes) > 0


def test_traffic_counts_headers_beside_images(photos: Path) -> None:
    traffic = read_traffic(photos, lanes=2, world_size=1, workers=0, images=IMAGES)
    # Three headers and two small members lie between two images.
    assert 1 < traffic.read_bytes / traffic.used_bytes < 1 + 4096 / 70_000
    assert traffic.used_bytes >= open_split(photos, "train").size.sum()


def test_order_is_timed() -> None:
    first, others = order_ms(Order(10_000, 0, 64, 8), batch=64, rounds=3)
    assert first > 0
    assert others > 0


@pytest.mark.parametrize(
    ("labels", "window", "expected"),
    [([1, 1, 2, 2], 2, 1.0), ([1, 2, 1, 2], 2, 2.0), ([1, 2, 3, 1, 1, 1, 9], 3, 2.0), ([5], 1, 1.0)],
)
def test_distinct_classes_are_counted_window_by_window(labels: list[int], window: int, expected: float) -> None:
    assert distinct_classes(np.array(labels), window) == expected


def test_the_machine_is_named() -> None:
    assert f"torch {torch.__version__.partition('+')[0]}" in machine()
    assert "cores" in machine()


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "no timm" in machine()


def test_order_and_mixing_are_reported(bench: DataBench) -> None:
    lines = list(report(bench, ["order", "mixing"]))
    assert lines[0] == machine()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "lanes" not in line]
    score = {(int(lanes), shards): float(of_ideal) for lanes, shards, _, of_ideal in cells}
    assert score[64, "shuffled, as built"] > 0.95
    assert score[64, "sorted by class"] < 0.5
    assert score[4096, "shuffled, as built"] > 0.95


@pytest.mark.usefixtures("in_this_process")
def test_resume_memory_and_reads_are_reported(bench: DataBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITSCALE_CACHE", "/nonexistent")
    lines = list(report(bench, ["resume", "memory", "reads"]))
    assert sum(line.startswith("| 1 | runs |") for line in lines) == 1
    assert sum(line.startswith("| worker 1 |") for line in lines) == 1
    assert sum(line.startswith("| 3 | no |") for line in lines) == 1
    assert os.environ["VITSCALE_CACHE"] == "/nonexistent"
    assert not list(bench.folder.glob("cache-*"))


@pytest.mark.usefixtures("in_this_process")
def test_batches_are_reported(bench: DataBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscale.bench.data.available_loaders", lambda: [OURS])
    lines = list(report(bench, ["batches"]))
    assert "not installed: webdataset + torchvision, timm" in lines[2]
    assert [line.split(" | ")[1] for line in lines if line.startswith("| vitscale")] == ["uint8", "float32"]


def test_a_kept_folder_is_kept_and_another_is_removed(tmp_path: Path) -> None:
    with work_folder(tmp_path / "new" / "kept") as folder:
        assert folder.is_dir()
    assert folder.is_dir()
    with work_folder(None) as folder:
        assert folder.is_dir()
    assert not folder.exists()
