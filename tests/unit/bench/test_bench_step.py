import importlib.util
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from distributed_runner import run_distributed_test

import vitscale.engine.compile
from vitscale.bench import STEP_ROWS, against_timm
from vitscale.bench.against_timm import BLOCKS, EAGER, WHOLE, compare_with_timm
from vitscale.bench.graphs import count_graphs
from vitscale.bench.loop_overhead import measure_loop
from vitscale.bench.photo_dataset import write_photo_dataset
from vitscale.bench.turns import Seconds, median_ms, ratio, take_turns, timed
from vitscale.cli.bench import command
from vitscale.errors import ConfigError
from vitscale.ranks import groups as process_group

TINY = "vit_tiny_patch16_224"


def test_turns_alternate_and_the_first_rounds_do_not_count():
    order = []
    contenders = {name: partial(order.append, name) for name in "ab"}
    times = take_turns(contenders, rounds=3, warmup_rounds=1)
    assert "".join(order) == "baabbaab"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_time_by_the_clock_is_not_processor_time():
    asleep = timed(lambda: time.sleep(0.05))
    assert asleep.wall >= 0.05 > asleep.cpu


def test_the_ratio_is_taken_pair_by_pair():
    theirs = [Seconds(wall, 2 * wall) for wall in (1.0, 2.0, 10.0, 4.0, 5.0)]
    ours = [Seconds(0.5 * wall, 3 * wall) for wall, _ in theirs]
    ours[2] = Seconds(100.0, 30.0)  # something else ran
    found = ratio(ours, theirs)
    assert (found.median, found.by_cpu) == (0.5, 1.5)
    assert 0.5 == found.low < found.high == 10.0
    assert str(found) == "0.500 (0.500 to 10.000)"
    assert median_ms(theirs) == 4000.0


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(100):
        noise = torch.randn(2, 15, generator=generator).mul(0.05).exp().tolist()
        ours, theirs = ([Seconds(scale * n, 1.0) for n in row] for scale, row in zip((0.9, 1.0), noise, strict=True))
        found = ratio(ours, theirs)
        held += found.low <= 0.9 <= found.high
    assert 85 <= held <= 100


def test_the_model_is_compared_with_timms_before_it_is_timed():
    [row] = compare_with_timm(TINY, 1, pairs=1, compiled=False)
    assert (row.name, row.way) == (TINY, EAGER)
    assert 0 <= row.output_difference <= 1e-5
    assert 0 <= row.gradient_difference <= 1e-4
    assert row.ratio.median == pytest.approx(row.ours_ms / row.timm_ms)


def test_a_compiled_model_is_compared_as_a_whole_and_block_by_block(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows = list(compare_with_timm(TINY, 1, pairs=1, compiled=True))
    assert [row.way for row in rows] == [WHOLE, BLOCKS]
    torch.compiler.reset()


def test_a_model_that_computes_something_else_is_not_timed(monkeypatch):
    twins = against_timm._twins

    def changed(name):
        ours, theirs = twins(name)
        ours.head.bias.data.add_(1e-3)
        return ours, theirs

    monkeypatch.setattr(against_timm, "_twins", changed)
    with pytest.raises(AssertionError, match=f"{TINY}: outputs differ from timm's by 1.0e-03"):
        list(compare_with_timm(TINY, 1, pairs=1, compiled=False))


def test_gradients_are_compared_over_each_parameters_largest():
    ours = {"logits": torch.tensor([1.0, 2.0]), "a": torch.tensor([100.0, 1.0]), "b": torch.tensor([0.02, 0.0])}
    theirs = {"logits": torch.tensor([1.0, 2.5]), "a": torch.tensor([100.0, 2.0]), "b": torch.tensor([0.01, 0.0])}
    assert against_timm._differences(ours, theirs) == (0.5, pytest.approx(1.0))
    with pytest.raises(AssertionError):
        against_timm._differences({"logits": ours["logits"]}, theirs)


def test_without_timm_the_mend_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        list(compare_with_timm(TINY, 1, pairs=1, compiled=False))
    assert str(caught.value) == "vitscale bench step --rows timm needs timm: pip install timm"


def _measure(rank, world_size, photos, folder):
    ranks = process_group.start()
    overhead = measure_loop(ranks, photos, folder / "run", model_name=TINY, micro_batch=2, workers=0, pairs=3)
    vitscale.engine.compile._compiler = lambda budget: partial(torch.compile, backend="eager", fullgraph=True)
    graphs = [count_graphs(ranks, stage) for stage in (0, 3)]
    # DeepSpeed cannot do without the first process group of a process: the command gets the one that is up.
    process_group.start, process_group.stop = lambda: ranks, lambda: None
    arguments = ["step", "--rows", "communication", "--threads", "1", "--keep", str(folder)]
    printed = CliRunner().invoke(command, arguments)
    return overhead, graphs, printed.exit_code, f"{printed.output}{printed.exception!r}"


def test_the_loop_the_graphs_and_the_collectives_are_measured(tmp_path: Path):
    photos = write_photo_dataset(tmp_path / "photos", 16, 8, distinct=2)
    [(overhead, graphs, exit_code, output)] = run_distributed_test(_measure, 1, photos, tmp_path, init=False)
    assert list(overhead.parts_ms) == ["forward", "backward", "update"]
    for bare_ms, loop_ms in overhead.parts_ms.values():
        assert 0 < bare_ms < overhead.bare_ms
        assert 0 < loop_ms < overhead.loop_ms
    assert 0 < overhead.ratio.low <= overhead.ratio.median <= overhead.ratio.high
    # The run was left where the pairs were counted.
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [(row.zero_stage, row.depth, row.breaks) for row in graphs] == [(0, 3, 0), (3, 3, 0)]
    assert all(row.graphs >= 1 for row in graphs)
    assert exit_code == 0, output
    lines = output.splitlines()
    assert any("1 threads, fp32" in line for line in lines)
    assert sum(line.startswith(("| 1 |", "| 2 |", "| 3 |")) for line in lines) == 12


def test_every_row_has_a_name():
    assert list(STEP_ROWS) == ["timm", "compiled", "loop", "communication", "graphs"]
