"""What only a GPU can show: parity with the CPU, kernels, compiled blocks, memory against the formulas."""

import pytest
import torch

from vitscale.bench.gpu import Climb, GpuBench
from vitscale.bench.ladder import LADDER
from vitscale.bench.parity import compare_with_cpu
from vitscale.ranks import groups as process_group

DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def ranks():
    found = process_group.start()
    yield found
    process_group.stop()


def bench(ranks, folder, **changes):
    settings = {"micro_batch": 16, "steps": 5, "workers": 4}
    return GpuBench(ranks, folder, say=print, **settings | changes)


def test_the_gpu_computes_what_the_cpu_does():
    fp32, *bf16 = compare_with_cpu(DEVICE)
    assert fp32.logits < 1e-4
    assert fp32.gradients < 1e-4
    ran = [found for found in bf16 if not found.failed]
    assert {"bfloat16, attention auto", "bfloat16, attention math"} <= {found.way for found in ran}
    for found in ran:
        assert found.logits < 3e-2, found  # bf16 has 8 bits of mantissa
        assert found.gradients < 3e-2, found


def test_every_rung_of_the_ladder_runs_and_fits_its_formula(ranks, tmp_path):
    results = list(Climb(bench(ranks, tmp_path), "vit_large_patch16_224").rungs())
    assert len(results) == sum(len(rung.alternatives) for rung in LADDER)
    for result in results:
        if result.failed:
            assert "attention" in result.rung or "float8" in result.rung, result
            continue
        assert result.loss == pytest.approx(10.99, abs=0.5)
        assert result.mfu is None or 0 < result.mfu < 1
    eager = next(result for result in results if result.rung.startswith("eager"))
    assert eager.peak_bytes == pytest.approx(eager.planned_bytes, rel=0.05)


def test_the_whole_loop_runs(ranks, tmp_path):
    for result in Climb(bench(ranks, tmp_path), "vit_base_patch16_224").whole_loop():
        assert result.images_per_s > 0
