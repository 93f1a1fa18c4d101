"""The GPU benchmark as it runs where there is no GPU: at micro size."""

import json
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from distributed_runner import run_distributed_test

import vitscale.engine.compile
from vitscale.bench.gpu import Climb, GpuBench
from vitscale.bench.ladder import LADDER
from vitscale.cli.bench import command
from vitscale.ranks import groups as process_group

GIANT, HUGE = "vit_giant_patch14_224", "vit_huge_patch14_224"


def _climb(rank, world_size, folder):
    vitscale.engine.compile._compiler = lambda budget: partial(torch.compile, backend="eager", fullgraph=True)
    ranks = process_group.start()
    # DeepSpeed cannot do without the first process group of a process: the command gets the one that is up.
    process_group.start, process_group.stop = lambda: ranks, lambda: None
    arguments = ["gpu", "--micro-batch", "4", "--steps", "1", "--workers", "0", "--models", GIANT, "--models", HUGE]
    printed = CliRunner().invoke(command, [*arguments, "--keep", str(folder), "--out", str(folder / "out")])
    batches = {}
    for memory_bytes in (None, 10**9, 3 * 10**7, 1):
        bench = GpuBench(ranks, folder, micro_batch=64, steps=1, workers=0, say=print, memory_bytes=memory_bytes)
        batches[memory_bytes] = Climb(bench, GIANT).micro_batch
    return printed.exit_code, f"{printed.output}{printed.exception!r}", batches


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    [found] = run_distributed_test(_climb, 1, folder, init=False)
    return folder, *found


def test_every_rung_runs_or_says_why_not(climbed):
    folder, exit_code, output, _ = climbed
    assert exit_code == 0, output
    results = json.loads((folder / "out" / "results.json").read_text())
    giant = [result for result in results if result["model"] == GIANT]
    huge = [result for result in results if result["model"] == HUGE]
    assert len(giant) == sum(len(rung.alternatives) for rung in LADDER) + 2
    assert len(huge) == sum(rung.stays and len(rung.alternatives) == 1 for rung in LADDER)
    for result in results:
        if result["failed"]:
            assert "attention" in result["rung"] or "float8" in result["rung"], result
            continue
        # A head that is -10 at first: ln(1 + e^10) for the right class, ln(1 + e^-10) for each of the others.
        assert result["loss"] == pytest.approx(10.99, abs=0.5)
        assert result["images_per_s"] > 0
    assert [result["rung"] for result in giant[-2:]] == [
        "the whole loop on one batch, again and again",
        "the whole loop on shards of photographs",
    ]


def test_the_report_is_what_was_printed(climbed):
    folder, _, output, _ = climbed
    report = (folder / "out" / "report.md").read_text()
    assert report.splitlines()[0].startswith("No GPU: a rehearsal at micro size")
    assert f"{HUGE}, 4 images a step, at micro size" in report
    printed = [line for line in output.splitlines() if line.startswith("|")]
    assert printed == [line for line in report.splitlines() if line.startswith("|")]


def test_the_micro_batch_is_halved_until_the_plan_fits_the_memory(climbed):
    *_, batches = climbed
    assert batches[None] == batches[10**9] == 64
    assert 2 <= batches[3 * 10**7] < 64
    assert batches[1] == 2
