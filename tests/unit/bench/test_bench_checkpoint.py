"""The bench of checkpoints at its smallest."""

import itertools
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from distributed_runner import run_distributed_test
from hypothesis import given
from hypothesis import strategies as st

from vitscale.bench import CHECKPOINT_ROWS
from vitscale.bench.checkpoint import line_through, load_apart, load_cost, write_plainly
from vitscale.bench.export import write_checkpoint
from vitscale.bench.fragments import VALUES, fragments_of_rank
from vitscale.checkpoint import CheckpointStore, parameter_shapes
from vitscale.cli.bench import command
from vitscale.model import TABLE
from vitscale.ranks import groups as process_group

TINY = "vit_tiny_patch16_224"
KINDS = ("asynchronous", "synchronous")


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    world_size=st.integers(1, 7),
    stage=st.sampled_from([2, 3]),
)
def test_the_ranks_hold_every_element_once(sizes, world_size, stage):
    shapes = {f"p{number}": (size,) for number, size in enumerate(sizes)}
    held = {name: [] for name in shapes}
    for rank in range(world_size):
        for fragment in fragments_of_rank(shapes, rank, world_size, stage, torch.ones):
            assert list(fragment.values) == list(VALUES)
            held[fragment.name].append((fragment.offset, fragment.offset + fragment.numel))
    for name, (size,) in shapes.items():
        assert [0, *itertools.chain(*held[name]), size] == sorted([0, *itertools.chain(*held[name]), size])
        assert sum(end - start for start, end in held[name]) == size


def test_a_line_is_found_with_what_it_explains():
    assert line_through([1, 2, 3], [5, 7, 9]) == pytest.approx((3, 2, 1))
    *_, explained = line_through([1, 2, 3, 4], [1, -1, -1, 1])
    assert explained == pytest.approx(0, abs=1e-9)


def test_the_plain_loop_writes_as_many_bytes(tmp_path):
    write_plainly(tmp_path / "file", 10, b"abcd")
    assert (tmp_path / "file").read_bytes() == b"abcdabcdab"


def test_a_loads_cost_is_that_of_one_ranks_part(tmp_path):
    write_checkpoint(TINY, tmp_path, ranks=2)
    shapes = parameter_shapes(TABLE[TINY].variant)
    whole = 12 * sum(torch.Size(shape).numel() for shape in shapes.values())
    directory = CheckpointStore(tmp_path).path("step-00000001")
    costs = [load_cost(directory, shapes, rank, 3, stage=3) for rank in range(3)]
    assert sum(cost.owned_bytes for cost in costs) == whole
    assert all(cost.seconds > 0 for cost in costs)
    assert load_apart(directory, shapes, 0, 3, 3).peak_bytes > 0  # this process may have had room for it


def _measure(rank, world_size, folder):
    ranks = process_group.start()
    process_group.start, process_group.stop = lambda: ranks, lambda: None
    printed = CliRunner().invoke(command, ["checkpoint", "--model", TINY, "--rounds", "1", "--keep", str(folder)])
    return printed.exit_code, f"{printed.output}{printed.exception!r}"


def test_loads_saves_and_stalls_are_measured(tmp_path: Path):
    [(exit_code, output)] = run_distributed_test(_measure, 1, tmp_path, init=False)
    assert exit_code == 0, output
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:2] == "| "]
    assert f"; {TINY}, 0.07 GB of state; 1 rounds" in output
    loads = [row for row in rows if len(row) == 7 and row[0] in {"2", "3"}]
    assert [int(row[1]) for row in loads] == 2 * [2, 3, 4, 6, 12, 24]
    assert all(float(row[3]) >= 0 and float(row[4]) > 0 for row in loads)
    assert output.count("To ZeRO ") == 2
    [saved] = [row for row in rows if row[0] == "save" and len(row) == 3]
    [written] = [row for row in rows if row[0] == "write and fsync"]
    assert float(saved[2]) > 0 < float(written[2])
    [[stalled], [waited]] = [[float(row[1]) for row in rows if row[0] == kind] for kind in KINDS]
    assert 0 < stalled < waited
    assert not (tmp_path / "plain.bin").exists()
    assert len(list((tmp_path / "stall" / "checkpoints").glob("step-*"))) == 1


def test_every_row_of_the_bench_has_a_name():
    assert list(CHECKPOINT_ROWS) == ["load", "save", "stall"]
