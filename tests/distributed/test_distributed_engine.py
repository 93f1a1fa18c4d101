"""The engines against the single-process oracle. Their state on the move is in test_checkpoint_matrix."""

import pytest
import torch
from distributed_runner import run_distributed_test
from engine_cases import build, micro_batches, train

from vitscale.engine import MASTER


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
