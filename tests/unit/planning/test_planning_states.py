"""State bytes against the published table, and how its parts follow stage, ranks and options."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.config import BatchSplit, EngineSection, OptimSection
from vitscale.engine import render_deepspeed_config
from vitscale.model import VARIANTS
from vitscale.planning import (
    ActivationRule,
    UpdateBytes,
    activation_bytes,
    largest_dividing,
    largest_micro_batch,
    parameter_parts,
    state_bytes,
    step_bytes,
    update_bytes,
)

SHAPES = {"H": "vit_huge_patch14_224", "g": "vit_giant_patch14_224", "G": "vit_gigantic_patch14_224"}
BUCKET = 100_000_000


def zero_of(stage, world_size, **changes):
    engine = EngineSection(zero_stage=stage, precision="bf16", **changes)
    return render_deepspeed_config(engine, BatchSplit(2 * world_size, 2, 1, world_size), 1.0, "bf16")[
        "zero_optimization"
    ]


def states(groups, stage, world_size, precision="bf16", options=None, **changes):
    zero = zero_of(max(stage, 1), world_size, **(options or {})) | {"stage": stage}
    return state_bytes(groups, world_size=world_size, zero=zero, precision=precision, **changes)


def parameters_of(name):
    variant = replace(VARIANTS[SHAPES[name]], num_classes=21_843, representation_size=0)
    return sum(parameter_parts(variant).values())


@pytest.mark.parametrize(
    ("name", "stage", "world_size", "gb"),
    [
        ("H", 1, 1, 13.6), ("H", 1, 8, 4.4), ("H", 1, 64, 3.2),
        ("g", 1, 1, 21.2), ("g", 1, 8, 6.7), ("g", 1, 64, 4.8),
        ("G", 1, 1, 38.0), ("G", 1, 8, 11.7), ("G", 1, 64, 8.4),
        ("H", 2, 64, 1.9), ("g", 2, 64, 2.8), ("G", 2, 64, 4.7),
    ],
)  # fmt: skip
def test_the_parts_add_up_to_the_published_table(name, stage, world_size, gb):
    """The table adds up what is not there at once: all gradients, two buckets and the fp32 gradients of the update."""
    parameters = parameters_of(name)
    state = states([[parameters]], stage, world_size, options={"overlap_comm": True})
    gradients = 2 * parameters if stage == 1 else 2 * parameters / world_size
    weights = 2 * parameters
    assert state.weights == pytest.approx(weights)
    assert state.bucket == 2 * 2 * BUCKET
    added = state.weights + gradients + state.master + state.moments + 4 * parameters / world_size + state.bucket
    assert added / 1e9 == pytest.approx(gb, abs=0.06)


@pytest.mark.parametrize(("name", "gb"), [("H", 2.0), ("g", 2.8), ("G", 3.1)])
def test_the_published_table_at_stage_3_has_all_parameters_gathered(name, gb):
    parameters, world_size = parameters_of(name), 64
    state = states([[parameters]], 3, world_size)
    own = state.total + 4 * parameters / world_size
    live, prefetch = 2 * min(parameters, 1e9), 2 * 5e7
    assert (own + 2 * 2 * BUCKET + live + prefetch) / 1e9 == pytest.approx(gb, abs=0.08)


@given(
    groups=st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=8), min_size=1, max_size=3),
    world_size=st.integers(1, 9),
    element=st.sampled_from([("bf16", 2), ("fp32", 4)]),
)
def test_each_stage_divides_one_more_part(groups, world_size, element):
    precision, size = element
    parameters = sum(map(sum, groups))
    padding = 2 * world_size * len(groups)
    for stage in (1, 2):
        found = states(groups, stage, world_size, precision)
        assert size * parameters <= found.weights <= size * (parameters + padding)
        assert found.master * world_size == found.weights * Fraction(4, size)
        assert found.moments == 2 * found.master
    third = states(groups, 3, world_size, precision)
    tensors = sum(map(len, groups))
    share = Fraction(parameters, world_size)
    assert share <= Fraction(third.master, 4) < share + tensors
    assert third.gradients == size * third.master // 4


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=30), world_size=st.integers(1, 7))
def test_a_rank_holds_the_gradients_of_all_parameters_that_touch_its_partition(sizes, world_size):
    unit = 2 * world_size
    partition = -(-sum(sizes) // unit) * unit // world_size
    zero = zero_of(2, world_size)
    for rank in range(world_size):
        mine = range(rank * partition, (rank + 1) * partition)
        touching = [n for i, n in enumerate(sizes) if set(range(sum(sizes[:i]), sum(sizes[: i + 1]))) & set(mine)]
        found = state_bytes([sizes], world_size=world_size, rank=rank, zero=zero, precision="bf16")
        assert found.reduced == 2 * sum(touching)


def test_the_fullest_rank_is_planned_for():
    sizes, world_size = [[300, 20, 20, 20, 400, 7]], 4
    zero = zero_of(2, world_size)
    by_rank = [
        state_bytes(sizes, world_size=world_size, rank=rank, zero=zero, precision="bf16").reduced
        for rank in range(world_size)
    ]
    assert state_bytes(sizes, world_size=world_size, zero=zero, precision="bf16").reduced == max(by_rank)


def test_fp32_without_zero_has_no_copy_of_the_weights():
    assert states([[1000]], 0, 2, "fp32").total == 4000 + 4000 + 8000


def test_a_moving_average_is_one_more_fp32_partition():
    plain, averaged = (states([[1000]], 2, 10, average=average) for average in (False, True))
    assert (averaged.average, averaged.resident - plain.resident) == (400, 400)


def test_offload_moves_the_optimizer_to_the_host():
    device, host = states([[8000]], 2, 8), states([[8000]], 2, 8, options={"offload": "optimizer"})
    assert (host.master, host.moments) == (0, 0)
    assert host.host > device.master + device.moments
    assert host.peak(0) < device.peak(0)


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({}, UpdateBytes(8)),
        ({"fused": False}, UpdateBytes(8, scratch=8)),
        ({"kind": "lamb", "weight_decay": 0.1}, UpdateBytes(8, scratch=4)),
        ({"kind": "sgd"}, UpdateBytes(4)),
        ({"kind": "sgd", "momentum": 0.0}, UpdateBytes(0)),
        ({"kind": "adafactor"}, UpdateBytes(4, whole=4 * (64 + 32), plain=30, scratch=4, piece=12)),
        ({"kind": "adafactor", "momentum_dtype": "bf16"}, UpdateBytes(2, whole=4 * 96, plain=30, scratch=4, piece=12)),
    ],
)
def test_what_each_optimizer_keeps(optim, expected):
    assert update_bytes(OptimSection(peak_lr=1e-3, **optim), [(64, 32), (30,)]) == expected


def test_the_largest_micro_batch_is_the_last_that_fits():
    variant, rule = VARIANTS[SHAPES["g"]], ActivationRule()
    state = states([[parameters_of("g")]], 1, 8)
    largest = largest_micro_batch(variant, rule, state, 76e9)
    assert step_bytes(variant, largest, rule, state) <= 76e9 < step_bytes(variant, largest + 2, rule, state)
    assert largest % 2 == 0
    assert largest_micro_batch(variant, rule, state, 1e9) == 0


@pytest.mark.parametrize(("largest", "rank_batch", "found"), [(208, 512, 128), (7, 12, 6), (5, 9, 0), (0, 8, 0)])
def test_the_largest_that_divides(largest, rank_batch, found):
    assert largest_dividing(largest, rank_batch) == found


def test_the_peak_is_the_highest_of_the_phases():
    state = states([[100_000_000]], 1, 4)
    kept = activation_bytes(VARIANTS[SHAPES["H"]], 64, ActivationRule()).kept
    assert state.peak(kept) == state.resident + state.bucket + state.flight + kept
    assert state.peak(0) == state.resident + max(state.reducing, state.stepping)
