"""What a step may be asked beside the update, by every engine at every ZeRO stage."""

import math
import time
from pathlib import Path

import pytest
import torch
from distributed_runner import run_distributed_test
from engine_cases import IMAGE_PX, build, load, manifest_of, micro_batches, micro_model, save

from vitscale.checkpoint import stored_weights
from vitscale.config import AverageSection
from vitscale.engine import AVERAGE, MASTER, PARTS
from vitscale.engine.averaging import average_decay
from vitscale.engine.timing import StepClock

CASES = (("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))
AVERAGED = AverageSection(decay=0.9, every_steps=2)
LR = 1e-3


def _state(engine):
    """Everything a checkpoint would hold, and what the model computes from it."""
    values = {(f.name, f.offset, key): v.clone() for f in engine.fragments() for key, v in f.values.items()}
    images = torch.ones(2, 3, IMAGE_PX, IMAGE_PX)
    return values | {"updates": torch.tensor(engine.optimizer_steps()), "logits": engine.predict(images).clone()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _step(engine, step, rank, world_size, poison=None, **asked):
    batches = list(micro_batches(step, rank, world_size))
    if poison is not None:
        batches[0][0][0, 0, 0, 0] = poison
    return engine.train_step(batches, LR, **asked)


def _skip(rank, world_size, cases, precision):
    outcome = {}
    for kind, stage in cases:
        average = None if precision == "bf16" else AVERAGED
        seen = []
        plain = build(kind, stage, rank, world_size, precision, average)
        for step in range(3):
            _step(plain, step, rank, world_size)
        engine = build(kind, stage, rank, world_size, precision, average)
        states, skipped = [_state(engine)], []

        def guard(norm, seen=seen):
            seen.append(norm)
            return len(seen) not in (1, 4)  # the first step and a later one; infinite and nan norms it lets pass

        for step, poison in (
            (0, None),
            (0, None),
            (1, None),
            (9, None),
            (9, float("inf")),
            (9, float("nan")),
            (2, None),
        ):
            # Only one rank meets the bad image.
            result = _step(engine, step, rank, world_size, poison if rank == 0 else None, accept=guard)
            skipped.append(result.skipped)
            states.append(_state(engine))
        outcome[kind, stage] = {
            "skipped": skipped,
            "asked": seen,
            "untouched": _same(states[0], states[1]) and all(_same(states[3], s) for s in states[4:7]),
            "moved": not _same(states[1], states[2]),
            "as if it never was": _same(states[-1], _state(plain)),
            "unasked": _step(engine, 3, rank, world_size).skipped,
        }
    return outcome


@pytest.mark.parametrize(("precision", "cases"), [("fp32", CASES), ("bf16", CASES[2:])])
def test_a_skipped_update_leaves_no_trace(precision, cases):
    norm = float(_step(build("torch", 0, 0, 1), 0, 0, 1).grad_norm)
    by_rank = run_distributed_test(_skip, 2, cases, precision)
    for case in cases:
        for found in (by_rank[0][case], by_rank[1][case]):
            assert found["skipped"] == [True, False, False, True, True, True, False], case
            assert found["untouched"], case
            assert found["moved"], case
            assert found["as if it never was"], case
            assert found["unasked"] is False, case
            # No loss scale is in it, in bf16 with its 8 bits of mantissa neither.
            assert found["asked"][0] == pytest.approx(norm, rel=1e-5 if precision == "fp32" else 0.05), case
            assert [math.isfinite(norm) for norm in found["asked"]] == [True] * 4 + [False] * 2 + [True], case
        assert by_rank[0][case]["asked"] == pytest.approx(by_rank[1][case]["asked"], nan_ok=True), case


def _other_accumulations(rank, world_size, cases):
    outcome = {}
    for kind, stage in cases:
        engine = build(kind, stage, rank, world_size)
        outcome[kind, stage] = []
        for step, micro_steps in enumerate((3, 1, 3, 2, 2)):
            taken = micro_steps * (2 // world_size)
            engine.set_grad_accum(taken)
            result = engine.train_step(list(micro_batches(step, rank, world_size))[:taken], LR)
            outcome[kind, stage].append((float(result.loss), float(result.grad_norm)))
    return outcome


def test_accumulation_changes_between_steps():
    oracle = _other_accumulations(0, 1, [("torch", 0)])["torch", 0]
    by_rank = run_distributed_test(_other_accumulations, 2, CASES)
    for case in CASES:
        loss = [(a + b) / 2 for (a, _), (b, _) in zip(by_rank[0][case], by_rank[1][case], strict=True)]
        assert loss == pytest.approx([value for value, _ in oracle], rel=1e-5), case
        assert [n for _, n in by_rank[0][case]] == pytest.approx([value for _, value in oracle], rel=1e-5), case


def _averages(rank, world_size, folder):
    outcome = {}
    images = torch.ones(2, 3, IMAGE_PX, IMAGE_PX)
    for kind, stage in CASES:
        place = folder / f"{kind}{stage}-{world_size}"
        engine = build(kind, stage, rank, world_size, average=AVERAGED)
        average = {(f.name, f.offset): f.values[MASTER].double() for f in engine.fragments()}
        for step in range(4):
            _step(engine, step, rank, world_size)
            if step % 2:  # every second update
                kept = average_decay(AVERAGED, (step + 1) // 2)
                for f in engine.fragments():
                    key = f.name, f.offset
                    average[key] = kept * average[key] + (1 - kept) * f.values[MASTER].double()
        off = max(float((average[f.name, f.offset] - f.values[AVERAGE]).abs().max()) for f in engine.fragments())
        before = _state(engine)
        with engine.averaged():
            logits = engine.predict(images).clone()
        restored = _same(before, _state(engine))
        counted = save(engine, place, rank)
        if world_size > 1:
            torch.distributed.barrier()
        again = build(kind, stage, rank, world_size, average=AVERAGED)
        load(again, place, world_size, counted)
        resumed = _same(before, _state(again))
        for step in range(4, 6):
            _step(engine, step, rank, world_size)
            _step(again, step, rank, world_size)
        outcome[kind, stage] = off, restored, logits, resumed and _same(_state(engine), _state(again))
    return outcome


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_average_is_that_of_a_plain_loop_and_resumes_bitwise(tmp_path: Path, world_size):
    by_rank = run_distributed_test(_averages, world_size, tmp_path)
    for kind, stage in CASES:
        for found in by_rank:
            off, restored, logits, resumed = found[kind, stage]
            assert off <= 1e-7, (kind, stage)
            assert restored, (kind, stage)
            assert resumed, (kind, stage)
        model = micro_model().eval()
        directory, manifest = tmp_path / f"{kind}{stage}-{world_size}", manifest_of(world_size, 4)
        images = torch.ones(2, 3, IMAGE_PX, IMAGE_PX)
        with torch.no_grad():
            model.load_state_dict(stored_weights(directory, manifest))
            raw = model(images)
            model.load_state_dict(stored_weights(directory, manifest, value=AVERAGE))
            torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-6)
        assert not torch.allclose(raw, logits, rtol=0, atol=1e-4), "nothing tells the average from the weights"


def test_an_average_that_a_checkpoint_lacks_starts_as_its_weights(tmp_path: Path, caplog):
    engine = build("torch", 0, 0, 1)
    _step(engine, 0, 0, 1)
    counted = save(engine, tmp_path / "tag", 0)
    averaged = build("torch", 0, 0, 1, average=AVERAGED)
    load(averaged, tmp_path / "tag", 1, counted)
    assert all(torch.equal(f.values[AVERAGE], f.values[MASTER]) for f in averaged.fragments())
    assert "holds no moving average" in caplog.text


def _norms(rank, world_size, cases):
    outcome = {}
    for kind, stage in cases:
        engine = build(kind, stage, rank, world_size)
        results = [_step(engine, step, rank, world_size, measure=step != 1) for step in range(3)]
        refused = _step(engine, 3, rank, world_size, accept=lambda _: False, measure=True)
        outcome[kind, stage] = [
            (float(r.grad_norm), r.norms and {key: float(value) for key, value in r.norms.items()})
            for r in (*results, refused)
        ]
    return outcome


def test_norms_by_part_are_those_of_one_process_and_add_up():
    oracle = _norms(0, 1, [("torch", 0)])["torch", 0]
    by_rank = run_distributed_test(_norms, 2, CASES)
    for case in CASES:
        for (norm, parts), (_, expected) in zip(by_rank[0][case], oracle, strict=True):
            if expected is None:
                assert parts is None
                continue
            assert norm > 0.5, "the gradient has to be clipped for the test to see how that is undone"
            squares = sum(parts[f"grad_norm/{part}"] ** 2 for part in PARTS if f"grad_norm/{part}" in parts)
            assert squares == pytest.approx(norm**2, rel=1e-5), case
            assert parts == pytest.approx(expected, rel=1e-4), case
        assert by_rank[0][case] == by_rank[1][case], "every rank knows the whole"
        refused = by_rank[0][case][-1][1]
        assert all(value == 0 for key, value in refused.items() if key.startswith("update_norm/")), case


def _times(rank, world_size):
    clock = StepClock(torch.device("cpu"))
    torch.distributed.barrier()
    with clock.phase("backward"):
        time.sleep(0.3 * rank)
        torch.distributed.barrier()
    waits = clock.times().communication_s, clock.times().backward_s
    found = {}
    for kind, stage in CASES:
        engine = build(kind, stage, rank, world_size)
        batches = list(micro_batches(0, rank, world_size))
        started_s = time.perf_counter()
        times = engine.train_step(batches, LR).times
        found[kind, stage] = time.perf_counter() - started_s, times.forward_s, times.backward_s, times.optimizer_s
        found[kind, stage] += (times.communication_s,)
    return waits, found


def test_the_parts_of_a_step_are_timed_apart():
    by_rank = run_distributed_test(_times, 2)
    for rank, (waits, found) in enumerate(by_rank):
        assert (waits[0] > waits[1]) == (rank == 0), "rank 0 waited for rank 1, which slept"
        for case, (step_s, *parts) in found.items():
            assert sum(parts) <= step_s, case
            assert all(part > 0 for part in parts[:3]), case
            assert (parts[3] > 0) == (case[0] == "deepspeed"), "the reducer of DDP works out of sight"


def _torch_bf16(rank, world_size):
    engine = build("torch", 0, rank, world_size, precision="bf16")
    return [float(_step(engine, step, rank, world_size).loss) for step in range(2)]


def test_the_torch_engine_in_bf16_follows_fp32_over_ranks():
    engine = build("torch", 0, 0, 1)
    oracle = [float(_step(engine, step, 0, 1).loss) for step in range(2)]
    losses = [sum(pair) / 2 for pair in zip(*run_distributed_test(_torch_bf16, 2), strict=True)]
    assert losses == pytest.approx(oracle, rel=2e-2)  # bf16 has 8 bits of mantissa
    assert losses != oracle
