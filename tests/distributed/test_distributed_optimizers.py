"""Optimizers at every ZeRO stage against the single process, on recorded gradients, and their state on the move."""

import itertools

import pytest
import torch
from distributed_runner import run_distributed_test
from engine_cases import build, train
from recorded_gradients import (
    OPTIMIZERS,
    RecordedGradients,
    assemble,
    build_recorded,
    feed,
    load_recorded,
    recorded_gradient,
    recorded_rate,
    save_recorded,
    state_of,
)

from vitscale.config import OptimSection
from vitscale.engine.optimizer_state import fragments_of
from vitscale.optim import Flat, Segment, build_optimizer

STAGES = (1, 2, 3)
SEGMENTED = ("lamb", "adafactor", "adafactor bf16")
STEPS = 10
"""Before each move."""


def bf16_ulps(got, expected):
    """Distance in units of the last of 8 bits, elementwise."""
    _, exponent = torch.frexp(torch.maximum(got.abs(), expected.abs()).float())
    return (got.float() - expected.float()).abs() / torch.ldexp(
        torch.ones_like(expected, dtype=torch.float32), exponent - 8
    )


def assert_same_state(got, expected, case):
    assert got.keys() == expected.keys()
    for what, value in expected.items():
        assert got[what].dtype == value.dtype
        assert got[what].shape == value.shape
        if value.dtype == torch.bfloat16:
            assert bf16_ulps(got[what], value).max() <= 1, (case, what)
        elif case == "adafactor bf16":  # a momentum that rounds the other way moves the weight by rate x ulp
            assert (got[what] - value).abs().max() <= 1e-4 * value.abs().max(), (case, what)
        else:
            assert (got[what] - value).abs().max() <= 1e-6 * value.abs().max(), (case, what)


def single_process(case, steps):
    engine = build_recorded(case, None, 0, 1)
    feed(engine, range(steps))
    return assemble([state_of(engine)])


def _travel(rank, world_size, folder, route):
    """For each optimizer, load what the place before has saved, go on and save: [(loaded, trained)] by case."""
    found = {case: [] for case in OPTIMIZERS}
    for case, (index, stage, saved_by) in itertools.product(OPTIMIZERS, route):
        engine = build_recorded(case, stage, rank, world_size)
        if index:
            load_recorded(engine, folder / case / str(index - 1), saved_by, index * STEPS)
        loaded = state_of(engine)
        feed(engine, range(index * STEPS, (index + 1) * STEPS))
        assert engine.optimizer_steps() == (index + 1) * STEPS
        save_recorded(engine, folder / case / str(index), rank)
        torch.distributed.barrier()
        found[case].append((loaded, state_of(engine)))
    return found


def test_state_travels_bitwise_between_stages_and_worlds_and_training_goes_on_as_in_one_process(tmp_path):
    # (number of the place, ZeRO stage or None for plain torch, ranks of the place before)
    routes = {2: [(0, 1, 0), (1, 2, 2), (2, 3, 2)], 3: [(3, 2, 2), (4, None, 3), (5, 3, 3)], 1: [(6, 0, 3), (7, 1, 1)]}
    places = {case: [] for case in OPTIMIZERS}
    for world_size, route in routes.items():
        by_rank = run_distributed_test(_travel, world_size, tmp_path, route, timeout_s=280)
        for case in OPTIMIZERS:
            for place in range(len(route)):
                places[case].append([assemble([rank[case][place][when] for rank in by_rank]) for when in (0, 1)])
    for case, states in places.items():
        for (_, saved), (loaded, _) in itertools.pairwise(states):
            assert saved.keys() == loaded.keys()
            assert all(torch.equal(loaded[what], saved[what]) for what in saved), case
        assert_same_state(states[-1][1], single_process(case, len(states) * STEPS), case)


def _flat_partitions(rank, world_size, cases, steps):
    """Each group cut into equal flat pieces with padding, stepped by itself as ZeRO does, without DeepSpeed."""
    found = {}
    for case in cases:
        model = RecordedGradients()
        optimizer = build_optimizer(model, OptimSection(peak_lr=1.0, **OPTIMIZERS[case]))
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [(group, *_partition(group["params"], names, rank, world_size)) for group in optimizer.param_groups]
        for group, flat, _ in groups:
            group["params"] = [flat.tensor]
        flats = [flat for _, flat, _ in groups]
        optimizer.bind(flats, torch.distributed.group.WORLD)
        for step in range(steps):
            grads = model.split(recorded_gradient(step))
            for group, flat, held in groups:
                flat.tensor.grad = held(grads)
                group["lr"] = recorded_rate(step)
                optimizer.param_groups = [group]
                optimizer.step()
        fragments = fragments_of(flats, optimizer, rank=rank, world_size=world_size, replicated=False)
        found[case] = [(f.name, f.offset, f.values) for f in fragments if f.saved_here]
    return found


def _partition(parameters, names, rank, world_size):
    """A rank's piece of a group, and the function that cuts it out of gradients by name."""
    size = -(-sum(p.numel() for p in parameters) // world_size) + 5  # longer than needed: padding at the end
    low, high, position, segments = rank * size, (rank + 1) * size, 0, []
    for p in parameters:
        start, end = max(low, position), min(high, position + p.numel())
        run = (start - position, start - low, end - start) if start < end else (0, 0, 0)
        segments.append(Segment(names[p], tuple(p.shape), *run))
        position += p.numel()

    def held(values):
        joined = torch.cat([values[names[p]].reshape(-1) for p in parameters])
        return torch.cat([joined, torch.zeros(world_size * size - len(joined))])[low:high].clone()

    piece = torch.nn.Parameter(held({names[p]: p.detach() for p in parameters}))
    return Flat(piece, tuple(segments)), held


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_200_steps_on_flat_partitions_equal_the_single_process(world_size):
    by_rank = run_distributed_test(_flat_partitions, world_size, SEGMENTED, 200)
    for case in SEGMENTED:
        assert_same_state(assemble([found[case] for found in by_rank]), single_process(case, 200), case)


def _every_stage(rank, world_size, cases, steps):
    found = {}
    for case, stage in itertools.product(cases, STAGES):
        engine = build_recorded(case, stage, rank, world_size)
        feed(engine, range(steps))
        found[case, stage] = state_of(engine)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_200_steps_at_every_stage_equal_the_single_process(world_size):
    by_rank = run_distributed_test(_every_stage, world_size, SEGMENTED, 200, timeout_s=900)
    for case in SEGMENTED:
        expected = single_process(case, 200)
        for stage in STAGES:
            assert_same_state(assemble([found[case, stage] for found in by_rank]), expected, case)


REAL = [
    OptimSection(kind="lamb", peak_lr=5e-3, weight_decay=0.1),
    OptimSection(kind="adafactor", peak_lr=5e-3, weight_decay=0.03, head_weight_decay=3.0),
    OptimSection(kind="sgd", peak_lr=5e-3),
]


def _real_loops(rank, world_size):
    return {
        (section.kind, stage): train(
            build("deepspeed", stage, rank, world_size, optim=section), range(10), rank, world_size
        )
        for section in REAL
        for stage in STAGES
    }


def test_10_steps_of_a_real_model_equal_the_single_process():
    by_rank = run_distributed_test(_real_loops, 2)
    for section in REAL:
        expected = train(build("torch", 0, 0, 1, optim=section), range(10), 0, 1)
        assert expected[-1][0] < expected[0][0], "the oracle itself has to learn"
        for stage in STAGES:
            curves = [found[section.kind, stage] for found in by_rank]
            mean = [sum(loss for loss, _ in step) / 2 for step in zip(*curves, strict=True)]
            assert mean == pytest.approx([loss for loss, _ in expected], rel=1e-5), (section.kind, stage)
            norms = [norm for _, norm in curves[0]]
            assert norms == pytest.approx([norm for _, norm in expected], rel=1e-4), (section.kind, stage)
