"""What a start costs: the arithmetic by hand, and the bench at its smallest."""

import json
import math
import os
import subprocess

import pytest
from click.testing import CliRunner
from distributed_runner import run_distributed_test

from vitscale.bench import start as start_bench
from vitscale.bench.export import write_checkpoint
from vitscale.bench.start import growth, import_cost, meeting_cost, place_index
from vitscale.bench.start_constants import (
    CheckpointCost,
    Constants,
    ImportCost,
    IndexCost,
    MeetingCost,
    StartCounts,
)
from vitscale.bench.start_paper import PARTS, WORST, Cluster, Scale, seconds, table
from vitscale.bench.start_ranks import Meeting, in_ranks
from vitscale.checkpoint import CheckpointStore
from vitscale.cli.bench import command

TINY = "vit_tiny_patch16_224"
CONSTANTS = Constants(
    ImportCost(warm_s=4, warm_cpu_s=3, cold_s=9, cold_bytes=10**6, opens=1000, looks=500, size_bytes=10**9),
    MeetingCost(eager_s=0.25, lazy_s=0.125, vote_s=1e-3),
    StartCounts(groups=2, gathers=10, opens=3),
    IndexCost(convert_s=1e-3, open_s=0.5),
    CheckpointCost(hash_bytes_per_s=1000, place_bytes=2000, place_s=0.25, draw_s=1e-3),
)
SCALE = Scale(nodes=4, ranks_per_node=2, samples=8192, parameters=1000)
OPENS_ONCE = Cluster(True, 100, 0.5, 1e6, 1e5, 0.01, core=2)
EACH_OPENS = Cluster(False, 100, 0.5, 1e6, 100, 0.01, core=1)


@pytest.mark.parametrize(
    ("name", "once", "each"),
    [
        ("import: names", 1500 * 4 / 100, (1000 * 8 * 2 + 500 * 4) / 100),
        ("import: bytes", 4 * 1000, 4 * 1000),
        ("import: running it", 2, 4),
        ("rendezvous, all connect to all", 16, 32),
        ("rendezvous", 3, 6),
        ("votes and the like", 10 * 3 * 0.01, 10 * 3 * 0.01),
        ("index: conversion", 8.192 + 4 * 40 * 8192 / 1e6, 16.384 + 4 * 40 * 8192 / 1e6),
        ("index: open", 0.25 + 8 / 100, 0.5 + 8 / 100),
        ("index: shards there and whole", 2, 2),  # two shards, two looks each
        ("model with its first weights", 0.5, 1),
        ("checkpoint: sound to the last byte", 16_000 / 16_000 + 4.5, 16_000 / 100 + 4.5),
        ("checkpoint: where what lies", 0.125 + 0.16 + 0.008, 0.25 + 0.16 + 0.008),
        ("checkpoint: each rank's own state", 4000 / 1e5 + 0.08, 4000 / 100 + 0.08),
        ("small files", 0.24, 0.24),
        ("init.path, where there is one", 4 * 4000 / 1e6, 4 * 4000 / 1e6),
    ],
)
def test_the_seconds_are_those_by_hand(name, once, each):
    [part] = [part for part in PARTS if part.name == name]
    assert part.seconds(CONSTANTS, SCALE, OPENS_ONCE) == pytest.approx(once)
    assert part.seconds(CONSTANTS, SCALE, EACH_OPENS) == pytest.approx(each)


def test_the_table_adds_up_what_every_start_has():
    lines = list(table(CONSTANTS, SCALE))
    assert lines[0].startswith("| part | measured | grows with | 4 nodes x 2, s |")
    assert [line.split(" | ")[0] for line in lines[2:-2]] == [f"| {part.name}" for part in PARTS]
    assert [part.name for part in PARTS if not part.counted] == [
        "rendezvous, all connect to all",
        "init.path, where there is one",
    ]
    whole = sum(part.seconds(CONSTANTS, SCALE, WORST) for part in PARTS if part.counted)
    names, read = (part.seconds(CONSTANTS, SCALE, WORST) for part in PARTS[:2])
    assert f" to {seconds(whole)} s; with" in lines[-1]
    assert lines[-1].endswith(f" to {seconds(whole - names - read)} s")


def test_seconds_are_told_in_two_digits_or_whole():
    assert [seconds(value) for value in (0.01234, 9.87, 12.3, 1090.4)] == ["0.012", "9.9", "12", "1,090"]


def test_growth_is_a_slope_and_none_where_there_is_none():
    assert growth([(2, 7), (4, 11), (8, 19)]) == pytest.approx(2)
    assert growth([(1, 3), (2, 2), (3, 1)]) == 0


def test_the_meetings_constants_are_those_of_their_kind():
    met = [
        Meeting(n, lazy, 1 + n * math.log2(n) if lazy else 3 * n**2, 0, 0.5 * n)
        for n in (2, 4, 8)
        for lazy in (False, True)
    ]
    found = meeting_cost(met)
    assert found.eager_s == pytest.approx(3)
    assert (found.lazy_s, found.vote_s) == pytest.approx((1, 0.5))


def test_an_import_is_counted_by_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    (tmp_path / "lonely.py").write_text("value = 1\n")
    without, found = import_cost((), 1), import_cost(("lonely",), 1)
    [compiled] = (tmp_path / "__pycache__").iterdir()
    assert found.opens == without.opens + 1
    assert found.looks > without.looks
    assert found.size_bytes == without.size_bytes + compiled.stat().st_size
    with pytest.raises(subprocess.CalledProcessError):
        import_cost(("there_is_no_such_module",), 1)


def test_the_projected_index_is_what_the_ranks_would_save(tmp_path):
    write_checkpoint(TINY, tmp_path, ranks=3)
    saved = json.loads((CheckpointStore(tmp_path).path("step-00000001") / "index.json").read_text())
    assert json.loads(place_index(TINY, 3))["values"] == saved["values"]


def test_one_number_of_ranks_shows_no_growth():
    printed = CliRunner().invoke(command, ["start", "--ranks", "4"])
    assert printed.exit_code == 2
    assert "two different numbers" in printed.output


def _measure(rank, world_size, folder):
    start_bench.IMPORTED = ("vitscale.errors",)  # those of a rank take seconds
    start_bench.in_a_fresh_process = lambda function, *words: function(*words)
    options = {
        "--model": TINY, "--nodes": 3, "--ranks-per-node": 2, "--samples": 9000, "--index-samples": 2000,
        "--built": TINY, "--rounds": 1, "--keep": folder,
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    printed = CliRunner().invoke(command, ["start", *words, "--ranks", "2", "--ranks", "3"])
    with pytest.raises(EOFError):
        in_ranks(2, True, 1, os._exit, 1)
    return printed.exit_code, f"{printed.output}{printed.exception!r}"


def test_every_part_is_measured_and_projected(tmp_path):
    [(exit_code, output)] = run_distributed_test(_measure, 1, tmp_path, init=False)
    assert exit_code == 0, output
    lines = output.splitlines()
    rows = {cells[0]: cells for line in lines if len(cells := line.strip("| ").split(" | ")) == 5}
    for part in PARTS:
        low, high = (float(value.replace(",", "")) for value in rows[part.name][3].split(" to "))
        assert 0 <= low <= high < math.inf
    assert "on 3 nodes x 2 = 6 ranks" in output
    assert "2 groups of all ranks" in rows["rendezvous"][1]
    assert rows["small files"][1].startswith("3 a rank: ")
    assert int(rows["votes and the like"][1].split()[0]) >= 8
    met = [line.strip("| ").split(" | ")[:2] for line in lines if "all to all |" in line or "when they talk |" in line]
    assert met == [[n, kind] for n in ("2", "3") for kind in ("all to all", "when they talk")]
