"""Which positions fall to whom when the ranks do not divide the batch."""

from itertools import islice

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro_data import train_loader

from vitscale.config import AugmentSection, BatchSection, DataSection, split_batch
from vitscale.data.augment import Augmentation
from vitscale.data.recipes import TrainRecipe

AUGMENT = {
    "rand_augment": {}, "three_augment": True, "jitter": {"hue": 0.1}, "erasing": {},
    "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}  # fmt: skip


class Positions(TrainRecipe):
    """A recipe without samples."""

    def cursor(self, position):
        raise NotImplementedError

    def parts(self, worker, workers):
        raise NotImplementedError


@given(
    half_batch=st.integers(1, 60),
    half_micro=st.integers(1, 10),
    world_size=st.integers(1, 9),
    half_start=st.integers(0, 500),
    workers=st.integers(1, 4),
)
def test_every_position_of_a_step_is_on_one_rank_once_and_pairs_are_whole(
    half_batch, half_micro, world_size, half_start, workers
):
    batch = BatchSection(global_batch=2 * half_batch, micro_batch=2 * half_micro, pad=True)
    split = split_batch(batch, world_size)
    start = 2 * half_start
    seen: list[list[int]] = [[] for _ in range(3)]
    for rank in range(world_size):
        recipe = Positions(None, None, split, rank, start)
        micro_batches = list(islice(recipe.micro_batches(), 3 * split.grad_accum))
        for number, request in enumerate(micro_batches):
            step = number // split.grad_accum
            assert request.step_end == start + (step + 1) * split.global_batch
            positions = request.positions
            assert len(positions) == split.micro_batch
            firsts, seconds = positions[::2], positions[1::2]
            assert (((firsts ^ 1) == seconds) | ((firsts == -1) & (seconds == -1))).all(), "mixup's partners are apart"
            shares = np.concatenate([recipe.places(request, worker, workers) for worker in range(workers)])
            assert sorted(shares) == np.flatnonzero(positions >= 0).tolist()
            seen[step] += positions[positions >= 0].tolist()
    for step, positions in enumerate(seen):
        first = start + step * split.global_batch
        assert sorted(positions) == list(range(first, first + split.global_batch))


def test_padding_is_blank_and_masked_and_the_images_are_those_of_one_rank(section: DataSection) -> None:
    """Two of three ranks have a micro-batch that is all padding; everything that augmentation can draw is drawn."""
    section = section.model_copy(update={"augment": AugmentSection.model_validate(AUGMENT)})
    split = split_batch(BatchSection(global_batch=8, micro_batch=2, pad=True), 3)
    whole = train_loader(section, split_batch(BatchSection(global_batch=8, micro_batch=8), 1))
    expected = {row.pop("position"): row for batch in islice(whole, 3) for row in rows_of(batch)}
    whole.close()
    augmentation = Augmentation(section.augment, 5, 8, 0.5, section.mean, section.std)
    padding = 0
    for rank in range(3):
        for workers in (0, 2) if rank == 2 else (0,):
            loader = train_loader(section.model_copy(update={"workers": workers}), split, rank)
            batches = list(islice(loader, 3 * split.grad_accum))
            loader.close()
            for batch in batches:
                assert torch.equal(batch.valid, batch.positions >= 0)
                assert torch.equal(batch.valid, batch.samples >= 0)
                assert not batch.images[~batch.valid].any()
                assert not any(drawn[~batch.valid.numpy()].any() for drawn in batch.drawn.values())
                assert augmentation.apply(batch.images, batch.labels, batch.drawn)[0].isfinite().all()
                padding += int((~batch.valid).sum()) if workers == 0 else 0
                for row in rows_of(batch):
                    if (position := row.pop("position")) >= 0:
                        assert row == expected[position]
    assert padding == 3 * split.padding > 0


def rows_of(batch):
    """Each row of a batch as plain values."""
    parts = {"position": batch.positions, "sample": batch.samples, "label": batch.labels, "image": batch.images}
    for row in range(len(batch.positions)):
        yield {name: part[row].tolist() for name, part in (parts | batch.drawn).items()}
