"""`vitscale preflight`: the choice from reports in a folder, and this machine by itself."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from vitscale.cli.preflight import command
from vitscale.errors import ConfigError, ExitStatus, LaunchError
from vitscale.train.preflight.reports import (
    Finding,
    NodeReport,
    Pair,
    RankReport,
    Stage,
    Standing,
    Transfer,
    write_report,
)

NODES = ("n07", "n08", "n10")


def invoke(*words):
    """Lines that came out and the exit status; an error of ours is raised."""
    result = CliRunner().invoke(command, [str(word) for word in words], standalone_mode=False)
    if result.exception is not None:
        result.exception.output = result.output
        raise result.exception
    return result.output.splitlines(), result.return_value


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """A folder with the reports of three sound nodes of two GPUs, and how to change them."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[07-08,10]")
    folder = tmp_path / "preflight"
    facts = {"torch": "2.15.0", "gpus": "2 x NVIDIA H100 80GB HBM3 79 GiB"}
    for place, node in enumerate(NODES):
        write_report(folder, NodeReport(node, facts, (Finding("clock", Standing.SOUND, "+0.0 s"),)))
        for local in range(2):
            pairs = tuple(Pair(peer, 180e9) for peer in NODES if peer != node)
            transfers = (Transfer("all-reduce", 1 << 16, 2e9), Transfer("all-gather", 256 << 20, 170e9))
            rank = RankReport(node, 2 * place + local, local, f"cuda:{local}", Stage.OVER, pairs=pairs)
            write_report(folder, replace(rank, flops_per_s=(700 - rank.rank) * 1e12, transfers=transfers))
    return folder


def test_the_chosen_nodes_are_in_the_hosts_file_a_line_a_rank(micro_config, reports):
    lines, status = invoke(micro_config, "--choose", reports, "--nodes", 2, "--tasks-per-node", 2)
    assert status == ExitStatus.FINISHED
    assert (reports / "hosts").read_text().split() == ["n07", "n07", "n08", "n08"]
    cards = "2 x NVIDIA H100 80GB HBM3 79 GiB"
    assert [" ".join(line.split()) for line in lines] == [
        "node devices slowest network",
        f"n07 {cards} 699 TFLOP/s 180 GB/s used",
        f"n08 {cards} 697 TFLOP/s 180 GB/s used",
        f"n10 {cards} 695 TFLOP/s 180 GB/s spare",
        "bus bandwidth among all ranks: all-reduce of 64 KiB 2 GB/s, all-gather of 256 MiB 170 GB/s",
        "2 nodes x 2 ranks: n07 n08",
    ]
    written = json.loads((reports / "report.json").read_text())
    assert written["choice"] == {"used": ["n07", "n08"], "status": 0, "reason": ""}
    assert [rank["rank"] for rank in written["ranks"]] == [0, 1, 2, 3, 4, 5]
    assert sorted(path.name for path in reports.iterdir()) == ["hosts", "report.json"]


def test_a_broken_node_is_named_and_its_place_taken_by_a_spare_one(micro_config, reports):
    (reports / "n08.json").unlink()
    lines, _ = invoke(micro_config, "--choose", reports, "--nodes", 2, "--tasks-per-node", 2)
    assert (reports / "hosts").read_text().split() == ["n07", "n07", "n10", "n10"]
    assert lines[2].split()[0] == "n08"
    assert lines[2].endswith("left out")
    assert lines[4].startswith("n08: no report: ")


def test_a_network_that_nobody_checked_is_told(micro_config, reports):
    (reports / "n07.json").unlink()
    for rank in range(6):
        (reports / f"rank-{rank:05d}.json").unlink()
    for rank in range(2, 6):
        fault = "no way to rank 0: timed out"
        write_report(reports, RankReport(NODES[rank // 2], rank, rank % 2, f"cuda:{rank % 2}", Stage.MEETING, fault))
    lines, _ = invoke(micro_config, "--choose", reports, "--nodes", 2, "--tasks-per-node", 2)
    assert lines[-2:] == [
        "warning: the network among all ranks was not checked: no rank came to the end of that check",
        "2 nodes x 2 ranks: n08 n10",
    ]


def test_fewer_nodes_are_as_many_as_the_batch_splits_on(micro_config, reports):
    words = (micro_config, "batch.global_batch=12", "--choose", reports, "--tasks-per-node", 2)
    (reports / "n08.json").unlink()
    _, status = invoke(*words, "--nodes", 3, "--min-nodes", 1)
    assert (reports / "hosts").read_text().split() == ["n07", "n07"]  # 12 images are not 2 nodes x 2 ranks x 2
    assert status == ExitStatus.FINISHED


def test_too_few_sound_nodes_are_worth_another_try(micro_config, reports):
    (reports / "n08.json").unlink()
    with pytest.raises(LaunchError, match="2 of 3 nodes can be used, the run needs 3") as found:
        invoke(micro_config, "batch.global_batch=12", "--choose", reports, "--nodes", 3, "--tasks-per-node", 2)
    assert found.value.status == ExitStatus.TRANSIENT
    assert (reports / "hosts").read_text() == ""
    assert "n08: no report" in found.value.output


def test_what_every_node_lacks_is_the_user_s_to_mend(micro_config, reports):
    missing = Finding("data", Standing.MEND, "/shards: not found: give a folder")
    for node in NODES:
        write_report(reports, NodeReport(node, {}, (missing,)))
    with pytest.raises(LaunchError, match="preflight: on every node: /shards: not found: give a folder") as found:
        invoke(micro_config, "--choose", reports, "--nodes", 2, "--tasks-per-node", 2)
    assert found.value.status == ExitStatus.USER_ERROR
    assert json.loads((reports / "report.json").read_text())["choice"]["status"] == 2


def test_a_batch_that_does_not_split_is_refused(micro_config, reports):
    with pytest.raises(ConfigError, match=r"batch.global_batch 8 is not 6 ranks x batch.micro_batch 2"):
        invoke(micro_config, "--choose", reports, "--nodes", 3, "--tasks-per-node", 2)
    phase = "schedule.phases=[{until: 4, global_batch: 12}]"
    with pytest.raises(ConfigError, match=r"batch.global_batch 12 is not 4 ranks"):
        invoke(micro_config, phase, "--choose", reports, "--nodes", 2, "--tasks-per-node", 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--choose", "d"], "--choose needs --nodes and --tasks-per-node"),
        (["--choose", "d", "--report", "d"], "give one of them"),
        (["--choose", "d", "--nodes", "1", "--wait", "9"], "--wait is read by the tasks alone"),
        (["--wait", "9"], "--wait is read by the tasks alone"),
        (["--nodes", "1"], "are of the choice: give them with --choose"),
        (["--report", "d", "--min-nodes", "1"], "are of the choice: give them with --choose"),
        (["--report", "d", "--tasks-per-node", "1"], "are of the choice: give them with --choose"),
        (["--choose", "d", "--nodes", "1", "--tasks-per-node", "1"], "SLURM_JOB_NODELIST is not set"),
    ],
)
def test_a_wrong_call_is_refused(micro_config, monkeypatch, words, said):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(Exception, match=said):
        invoke(micro_config, *words)


def test_fewer_nodes_than_the_least_are_refused(micro_config, reports):
    with pytest.raises(LaunchError, match="--min-nodes 3 is more than --nodes 2: give at most that many"):
        invoke(micro_config, "--choose", reports, "--nodes", 2, "--min-nodes", 3, "--tasks-per-node", 2)


def test_a_folder_without_room_is_refused(micro_config, reports):
    (reports / "hosts").mkdir()
    with pytest.raises(LaunchError, match="cannot be written"):
        invoke(micro_config, "--choose", reports, "--nodes", 2, "--tasks-per-node", 2)


def test_this_machine_is_checked_by_itself(micro_config):
    lines, status = invoke(micro_config)
    assert status == ExitStatus.FINISHED
    assert [line.split()[:2] for line in lines[:2]] == [["devices", "ok"], ["config", "ok"]]
    assert lines[-2].split()[:2] == ["cpu", "ok"]
    assert lines[-2].endswith("TFLOP/s")
    assert lines[-1].startswith("python ")
    lines, status = invoke(micro_config, "data.train.path=nowhere")
    assert status == ExitStatus.USER_ERROR
    assert any(line.startswith("data") and "FAULT" in line and "nowhere" in line for line in lines)


def test_a_task_alone_leaves_its_reports(micro_config, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n07")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n07")
    assert invoke(micro_config, "--report", tmp_path / "out")[1] == ExitStatus.FINISHED
    lines, _ = invoke(micro_config, "--choose", tmp_path / "out", "--nodes", 1, "--tasks-per-node", 1)
    assert lines[-1] == "1 nodes x 1 ranks: n07"
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"file/out: cannot be written on n07: .*give a folder that all nodes share"):
        invoke(micro_config, "--report", tmp_path / "file" / "out")


def test_the_choice_and_the_table_of_runs_do_not_wait_for_torch():
    check = "import sys, vitscale.cli.preflight, vitscale.cli.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
