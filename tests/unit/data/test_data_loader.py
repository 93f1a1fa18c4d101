import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from micro_data import mixture_of, train_loader

from vitscale.config import BatchSplit, DataSection
from vitscale.data.augment import Augmentation, crop_box, draw_crops, flips
from vitscale.data.batch import Batch, TrainBatch
from vitscale.data.decode import crop_resize, decode, resize_centre
from vitscale.data.loader import EvalLoader
from vitscale.data.order import Order
from vitscale.data.recipes import MixtureRecipe
from vitscale.errors import ShardError

ONE_RANK = BatchSplit(global_batch=16, micro_batch=8, grad_accum=2, world_size=1)


def train(
    section: DataSection, count: int, split: BatchSplit = ONE_RANK, rank: int = 0, start: int = 0
) -> list[TrainBatch]:
    loader = train_loader(section, split, rank, start)
    batches = list(islice(loader, count))
    loader.close()
    return batches


def evaluate(section: DataSection, micro_batch: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    (index,) = mixture_of(section).samples.indexes
    return list(EvalLoader(index, section, img_size=8, micro_batch=micro_batch, rank=rank, world_size=world_size))


def assert_same(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in ("images", "labels", "positions", "samples", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.substitutions == other.substitutions
        assert isinstance(one, TrainBatch) is isinstance(other, TrainBatch)
        if isinstance(one, TrainBatch) and isinstance(other, TrainBatch):
            assert one.cursor == other.cursor
            assert one.drawn.keys() == other.drawn.keys()
            for name, drawn in one.drawn.items():
                np.testing.assert_array_equal(drawn, other.drawn[name])


def test_batches_hold_what_the_order_says(section: DataSection, images: list[bytes]) -> None:
    batches = train(section, 8)  # 64 positions: over the end of the epoch of 45
    positions = np.arange(64)
    assert torch.cat([b.positions for b in batches]).tolist() == positions.tolist()
    rows = Order(45, 5, section.lanes, section.block).sample_at(positions)
    assert torch.cat([b.samples for b in batches]).tolist() == rows.tolist()
    assert torch.cat([b.labels for b in batches]).tolist() == (rows % 3).tolist()
    assert np.concatenate([b.drawn["flip"] for b in batches]).tolist() == flips(5, positions, 0.5).tolist()
    for position, row, image in zip(positions, rows, torch.cat([b.images for b in batches]), strict=True):
        box = crop_box(draw_crops(5, np.array([int(position)]))[0], 20, 26, section.crop_scale, section.crop_ratio)
        assert torch.equal(image, crop_resize(decode(images[row]), box, 8, "bilinear"))
    assert [b.cursor.position for b in batches] == [16, 16, 32, 32, 48, 48, 64, 64]
    assert all(b.valid.all() for b in batches)


def test_workers_do_not_change_the_batches(section: DataSection) -> None:
    with_workers = section.model_copy(update={"workers": 2, "prefetch_batches": 2})
    assert_same(train(section, 9), train(with_workers, 9))
    assert_same(evaluate(section, 8), evaluate(with_workers, 8))


@pytest.mark.parametrize(("world_size", "workers", "lanes"), [(1, 2, 4), (2, 3, 12), (4, 2, 64)])
def test_a_lane_is_read_by_one_worker_of_one_rank(
    section: DataSection, world_size: int, workers: int, lanes: int
) -> None:
    """So that its blocks are read whole and once; here the epoch does not end."""
    mixture = mixture_of(section)
    augmentation = Augmentation(section.augment, 5, 8, 0.5, section.mean, section.std)
    owners: dict[int, set[tuple[int, int]]] = {}
    for rank in range(world_size):
        split = BatchSplit(global_batch=2 * lanes, micro_batch=lanes // world_size, grad_accum=2, world_size=world_size)
        recipe = MixtureRecipe(section, augmentation, split, rank, 0, mixture)
        for request in islice(recipe.micro_batches(), 6):
            shares = [recipe.places(request, worker, workers) for worker in range(workers)]
            assert sorted(np.concatenate(shares)) == list(range(len(request.positions)))
            for worker, places in enumerate(shares):
                for position in request.positions[places].tolist():
                    owners.setdefault(position % lanes, set()).add((rank, worker))
    assert owners.keys() == set(range(lanes))
    assert all(len(owner) == 1 for owner in owners.values())


def test_memory_for_reading_ahead_does_not_change_the_batches(section: DataSection) -> None:
    """However few bytes a window holds."""
    tiny = section.model_copy(update={"read_ahead_mb": 1})
    assert_same(train(section, 9), train(tiny, 9))


def test_mixed_sources_and_repeats_resume_alike(section: DataSection, dataset: Path) -> None:
    sources = [{"path": str(dataset), "split": "train", "weight": weight} for weight in (1, 3)]
    tree = {"mix": sources, "lanes": 4, "block": 3, "augment": {"repeats": 2}}
    mixed = DataSection.model_validate({**tree, "workers": 0})
    whole = train(mixed, 12)
    assert_same(whole[6:], train(mixed, 6, start=whole[5].cursor.position))
    assert_same(whole, train(mixed.model_copy(update={"workers": 2}), 12))
    assert whole[0].cursor.repeats == 2


def test_resume_gives_the_very_same_batches(section: DataSection) -> None:
    whole = train(section, 10)
    stopped = whole[3].cursor
    assert_same(whole[4:], train(section, 6, start=stopped.position))


def test_ranks_together_see_what_one_rank_sees(section: DataSection) -> None:
    expected = {int(p): image for b in train(section, 6) for p, image in zip(b.positions, b.images, strict=True)}
    seen: dict[int, torch.Tensor] = {}
    for rank in range(2):
        split = BatchSplit(global_batch=16, micro_batch=4, grad_accum=2, world_size=2)
        for batch in train(section, 6, split, rank):
            seen |= {int(p): image for p, image in zip(batch.positions, batch.images, strict=True)}
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[p], expected[p]) for p in expected)


def test_loading_leaves_the_global_generator_alone(section: DataSection) -> None:
    before = torch.get_rng_state()
    train(section, 1)
    evaluate(section, 8)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 8), (3, 4), (4, 64), (7, 8)])
def test_evaluation_sees_every_sample_once(
    section: DataSection, images: list[bytes], world_size: int, micro_batch: int
) -> None:
    passes = [evaluate(section, micro_batch, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in passes}) == 1
    batches = [batch for own in passes for batch in own]
    assert all(batch.images.shape == (micro_batch, 3, 8, 8) for batch in batches)
    assert sorted(int(s) for b in batches for s in b.samples[b.valid]) == list(range(45))
    for batch in batches:
        assert (batch.samples[~batch.valid] == -1).all()
        for row, label, image in zip(
            *(t[batch.valid] for t in (batch.samples, batch.labels, batch.images)), strict=True
        ):
            assert label == row % 3
            expected = resize_centre(decode(images[row]), 8, section.val_crop, "bilinear")
            assert torch.equal(image, expected)


def with_path(section: DataSection, path: Path) -> DataSection:
    assert section.train is not None
    return section.model_copy(update={"train": section.train.model_copy(update={"path": str(path)})})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.fault(26, 28)
def test_a_bad_sample_is_replaced_and_named(
    section: DataSection, images: list[bytes], dataset_of: Callable[[Sequence[bytes]], Path], workers: int
) -> None:
    damaged = with_path(section, dataset_of([*images[:9], images[9][:-50], *images[10:]]))
    damaged = damaged.model_copy(update={"workers": workers})
    sound = train(section, 6)
    batches = train(damaged, 6)
    (substitution,) = [s for batch in batches for s in batch.substitutions if s.position < 45]
    assert (substitution.key, Path(substitution.shard).name) == ("image9", "train-000001.tar")
    assert substitution.reason == "jpeg: Premature end of JPEG file"
    for batch, reference in zip(batches, sound, strict=True):
        same = reference.samples != 9
        assert torch.equal(batch.images[same], reference.images[same])
        assert torch.equal(batch.samples[same], reference.samples[same])
        for place in np.flatnonzero(~same.numpy()):
            row = int(batch.samples[place])
            assert row != 9
            assert batch.labels[place] == row % 3
            position = int(batch.positions[place])
            assert f"image{row}" in [s.replaced_by for s in batch.substitutions if s.position == position]
    assert_same(batches, train(damaged, 6))


def test_a_bad_sample_is_left_out_of_evaluation(
    section: DataSection, images: list[bytes], dataset_of: Callable[[Sequence[bytes]], Path]
) -> None:
    damaged = with_path(section, dataset_of([*images[:9], b"no image", *images[10:]]))
    batches = evaluate(damaged, 8)
    assert sorted(int(s) for b in batches for s in b.samples[b.valid]) == [i for i in range(45) if i != 9]
    (substitution,) = [s for batch in batches for s in batch.substitutions]
    assert (substitution.key, substitution.replaced_by) == ("image9", "")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.fault(28)
def test_too_many_bad_samples_end_the_run(
    section: DataSection, images: list[bytes], dataset_of: Callable[[Sequence[bytes]], Path], workers: int
) -> None:
    damaged = with_path(section, dataset_of([*images[:20], *[b"no image"] * 3, *images[23:]]))
    enough = damaged.model_copy(update={"bad_sample_budget": 3, "workers": workers})
    assert sum(len(b.substitutions) for b in evaluate(enough, 8)) == 3
    with pytest.raises(ShardError, match=r"train-00000\d\.tar: sample image2\d is bad .* number 3 of such: .*above 2"):
        evaluate(enough.model_copy(update={"bad_sample_budget": 2}), 8)
    with pytest.raises(ShardError, match=r"raise data\.bad_sample_budget above 2") as raised:
        train(enough.model_copy(update={"bad_sample_budget": 2}), 12)
    assert "\n" not in str(raised.value)


def test_shards_of_another_build_end_the_run(
    section: DataSection, images: list[bytes], dataset_of: Callable[[Sequence[bytes]], Path]
) -> None:
    """Of the same names and sizes, so that only the checksums in the index can tell."""
    root = dataset_of(images)
    mixture = mixture_of(with_path(section, root))
    for shard in root.glob("*.tar"):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(ShardError, match=r"its crc32 is not the one in the index.* replacements cannot be read"):
        next(train_loader(with_path(section, root), ONE_RANK, mixture=mixture))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_ends_the_run(
    section: DataSection, dataset_of: Callable[[Sequence[bytes]], Path], workers: int
) -> None:
    damaged = with_path(section, dataset_of([b"no image"] * 5)).model_copy(update={"workers": workers})
    with pytest.raises(ShardError, match="and its 9 replacements cannot be read") as raised:
        train(damaged, 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_lost_on_the_way_is_one_line(
    section: DataSection, images: list[bytes], dataset_of: Callable[[Sequence[bytes]], Path], workers: int
) -> None:
    root = dataset_of(images)
    damaged = with_path(section, root).model_copy(update={"workers": workers})
    mixture = mixture_of(damaged)
    (root / "train-000003.tar").unlink()
    loaders = (
        train_loader(damaged, ONE_RANK, mixture=mixture),
        EvalLoader(mixture.samples.indexes[0], damaged, img_size=8, micro_batch=8, rank=0, world_size=1),
    )
    for loader in loaders:
        with pytest.raises(ShardError, match=r"train-000003\.tar: cannot be read"):
            list(islice(loader, 6))


JOB = """
import sys
from micro_data import train_loader
from vitscale.config import BatchSplit, DataSection

if __name__ == "__main__":
    path = sys.argv[1]
    section = DataSection.model_validate({"train": {"path": path, "split": "train"}, "workers": 2})
    loader = train_loader(section, BatchSplit(global_batch=8, micro_batch=8, grad_accum=1, world_size=1))
    print(next(loader).cursor.position, flush=True)
    for _ in sys.stdin:
        for _ in range(40):
            position = next(loader).cursor.position
        print(position, flush=True)
"""


def test_workers_outlive_the_jobs_signals_but_not_the_trainer(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    command = [sys.executable, str(tmp_path / "job.py"), str(dataset)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as job:
        assert job.stdin is not None
        assert job.stdout is not None
        assert job.stdout.readline() == "8\n"
        children = psutil.Process(job.pid).children(recursive=True)
        assert len(children) >= 3  # the fork server and two workers
        for child in children:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                os.kill(child.pid, number)
        job.stdin.write("go on\n")
        job.stdin.flush()
        assert job.stdout.readline() == f"{41 * 8}\n"
        job.kill()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


@pytest.mark.fault(25)
def test_a_killed_worker_ends_the_run_in_place_of_hanging_it(section: DataSection) -> None:
    with_workers = section.model_copy(update={"workers": 2, "prefetch_batches": 1})
    before = set(multiprocessing.active_children())
    loader = train_loader(with_workers, ONE_RANK)
    next(loader)
    victim = next(child for child in multiprocessing.active_children() if child not in before)
    victim.kill()
    with pytest.raises((RuntimeError, EOFError, OSError)):  # the last two where it dies while it hands over memory
        list(islice(loader, 1000))
    loader.close()


def test_close_ends_the_workers(section: DataSection) -> None:
    with_workers = section.model_copy(update={"workers": 2})
    parent = psutil.Process()
    before = {child.pid for child in parent.children(recursive=True)}
    loader = train_loader(with_workers, ONE_RANK)
    next(loader)
    loader.close()
    deadline = time.monotonic() + 5
    while extra := [c for c in parent.children(recursive=True) if c.pid not in before and "resource" not in c.name()]:
        if all("forkserver" in " ".join(c.cmdline()) and c.ppid() == parent.pid for c in extra):
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(StopIteration):
        next(loader)
