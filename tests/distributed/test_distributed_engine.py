"""Every engine at every ZeRO stage against the single-process oracle, and their state against each other."""

from pathlib import Path

import pytest
import torch
from distributed_runner import run_distributed_test
from engine_cases import build, load, manifest_of, micro_batches, micro_model, save, train

from vitscale.checkpoint import stored_weights
from vitscale.engine import MASTER

STAGES = (0, 1, 2, 3)


def _all_curves(rank, world_size, steps):
    return {
        kind: train(build(kind, 0, rank, world_size), range(steps), rank, world_size) for kind in ("deepspeed", "torch")
    }


def test_20_steps_without_zero_match_the_single_process_oracle():
    """Those of ZeRO's stages are 50 in test_distributed_communication."""
    oracle = train(build("torch", 0, 0, 1), range(20), 0, 1)
    by_rank = run_distributed_test(_all_curves, 2, 20)
    for case in by_rank[0]:
        loss = [(a + b) / 2 for (a, _), (b, _) in zip(by_rank[0][case], by_rank[1][case], strict=True)]
        norm = [n for _, n in by_rank[0][case]]
        assert loss == pytest.approx([value for value, _ in oracle], rel=1e-5), case
        assert norm == pytest.approx([value for _, value in oracle], rel=1e-4), case
    assert oracle[-1][0] < oracle[0][0] - 0.1, "the oracle itself has to learn"


def _save_all(rank, world_size, folder):
    outcome = {}
    for stage in STAGES:
        engine = build("deepspeed", stage, rank, world_size)
        train(engine, range(4), rank, world_size)
        counted = save(engine, folder / f"stage{stage}", rank)
        logits = engine.predict(next(micro_batches(0, 0, 1))[0])
        onward = train(engine, range(4, 8), rank, world_size)
        torch.distributed.barrier()
        again = build("deepspeed", stage, rank, world_size)
        load(again, folder / f"stage{stage}", world_size, counted)
        resumed = train(again, range(4, 8), rank, world_size)
        outcome[stage] = counted, onward, resumed, logits
    return outcome


def _load_all(rank, world_size, folder, stage, optimizer_steps):
    curves = {}
    for saved_stage in STAGES:
        engine = build("deepspeed", stage, rank, world_size)
        load(engine, folder / f"stage{saved_stage}", 2, optimizer_steps)
        curves[saved_stage] = train(engine, range(4, 8), rank, world_size)
    return curves


def test_state_resumes_bitwise_and_travels_between_stages_and_world_sizes(tmp_path: Path):
    saved = run_distributed_test(_save_all, 2, tmp_path)
    for rank in range(2):
        for stage in STAGES:
            counted, onward, resumed, _ = saved[rank][stage]
            assert counted == 4
            assert resumed == onward, f"stage {stage}, rank {rank}"

    images, _ = next(micro_batches(0, 0, 1))
    for stage in STAGES:
        model = micro_model().eval()
        model.load_state_dict(stored_weights(tmp_path / f"stage{stage}", manifest_of(2, 4)))
        with torch.no_grad():
            torch.testing.assert_close(model(images), saved[0][stage][3], rtol=0, atol=1e-6)

    onward = [(a + b) / 2 for (a, _), (b, _) in zip(saved[0][2][1], saved[1][2][1], strict=True)]
    for stage, world_size in ((1, 1), (3, 3)):
        by_rank = run_distributed_test(_load_all, world_size, tmp_path, stage, 4)
        for saved_stage in STAGES:
            curves = [[loss for loss, _ in by_rank[rank][saved_stage]] for rank in range(world_size)]
            mean = [sum(losses) / world_size for losses in zip(*curves, strict=True)]
            assert mean == pytest.approx(onward, rel=1e-5), (saved_stage, "->", stage, world_size)


def _bf16(rank, world_size):
    losses = {}
    for stage in (1, 2, 3):
        engine = build("deepspeed", stage, rank, world_size, precision="bf16")
        curve = train(engine, range(3), rank, world_size)
        masters = [fragment.values[MASTER] for fragment in engine.fragments()]
        images, _ = next(micro_batches(0, rank, world_size))
        losses[stage] = [loss for loss, _ in curve], {m.dtype for m in masters}, engine.predict(images).dtype
    return losses


def test_bf16_keeps_fp32_masters_and_follows_the_fp32_oracle():
    oracle = [loss for loss, _ in train(build("torch", 0, 0, 1), range(3), 0, 1)]
    by_rank = run_distributed_test(_bf16, 2)
    for stage in (1, 2, 3):
        mean = [(a + b) / 2 for a, b in zip(by_rank[0][stage][0], by_rank[1][stage][0], strict=True)]
        assert mean == pytest.approx(oracle, rel=2e-2)  # bf16 has 8 bits of mantissa
        assert by_rank[0][stage][1] == {torch.float32}
        assert by_rank[0][stage][2] == torch.float32
