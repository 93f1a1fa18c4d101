"""launch/cluster_state.py: what is made of Slurm's answers."""

import json
import os
import stat
from pathlib import Path

import cluster_state
import pytest
from cluster_state import (
    JobState,
    Partition,
    await_end,
    check_cluster,
    check_no_other_job,
    check_partition,
    job_state,
    note_job,
    read_partitions,
)
from job_request import JobRequest

from vitscale.errors import LaunchError

SINFO = """\
gpu*|12|128|gpu:a100:8(S:0-7)|2-00:00:00
gpu*|4|96|gpu:h100:4,gpu:mig_1g.5gb:2,shard:8|2-00:00:00
cpu|300|256|(null)|infinite
debug|1|64|gpu:2|30:00
"""
PARTITIONS = {
    "gpu": Partition(nodes=16, cpus=128, gpus=8, time_min=2880),
    "cpu": Partition(nodes=300, cpus=256, gpus=0, time_min=None),
    "debug": Partition(nodes=1, cpus=64, gpus=2, time_min=30),
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Give a command of Slurm's an answer, as a shell script."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answer(command: str, script: str) -> None:
        (tmp_path / command).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / command).chmod(0o755)

    return answer


def shown(state: str, exit_code: str) -> str:
    return f"echo 'JobId=12 JobName=run UserId=root(0) JobState={state} Reason=None ExitCode={exit_code} Restarts=0'"


def test_partitions_are_read_as_sinfo_prints_them():
    assert read_partitions(SINFO) == (PARTITIONS, "gpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"partition": "gpus"}, "--partition gpus: this cluster has none: use cpu or debug or gpu"),
        ({"nodes": 17}, "--nodes 17: partition gpu has at most 16 nodes"),
        ({"nodes": 16, "spare_nodes": 1}, "--nodes 16 --spare-nodes 1: partition gpu has at most 16 nodes"),
        ({"gpus_per_node": 9}, "--gpus-per-node 9: partition gpu has at most 8 GPUs a node"),
        ({"partition": "cpu", "gpus_per_node": 1}, "--gpus-per-node 1: partition cpu has at most 0 GPUs a node"),
        (
            {"gpus_per_node": 8, "cpus_per_task": 17},
            "--tasks-per-node 8 --cpus-per-task 17: partition gpu has at most 128 CPUs a node",
        ),
        ({"time": "2-00:01"}, "--time 2-00:01: partition gpu has at most 2880 minutes"),
        ({"partition": "gpu,gpus"}, "--partition gpus: this cluster has none: use cpu or debug or gpu"),
        ({"partition": "debug,gpu", "nodes": 17}, "--nodes 17: partition debug has at most 1 nodes"),
    ],
)
def test_what_no_node_could_ever_run(fields, message):
    with pytest.raises(LaunchError, match=message):
        check_partition(JobRequest.model_validate(fields), PARTITIONS, "gpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"nodes": 16, "gpus_per_node": 8, "cpus_per_task": 16},
        {"partition": "cpu", "time": "90-0"},
        {"partition": "debug,gpu", "nodes": 16},
    ],
)
def test_what_can_run(fields):
    check_partition(JobRequest.model_validate(fields), PARTITIONS, "gpu")


def test_without_a_default_partition_slurm_is_left_to_speak():
    check_partition(JobRequest(nodes=999), PARTITIONS, None)


def test_the_cluster_of_this_machine_is_asked_and_need_not_answer(slurm):
    slurm("sinfo", "echo 'only*|1|1|(null)|infinite'")
    with pytest.raises(LaunchError, match="--nodes 2: partition only has at most 1 nodes"):
        check_cluster(JobRequest(nodes=2))
    slurm("sinfo", "exit 1")
    check_cluster(JobRequest(nodes=2))
    slurm("sinfo", """case "$*" in *--all*) echo 'hidden|4|1|(null)|infinite' ;; esac""")
    check_cluster(JobRequest(nodes=2, partition="hidden"))


@pytest.mark.parametrize(
    ("answer", "state", "exit_status"),
    [
        (shown("RUNNING", "0:0"), JobState("RUNNING", 0), 1),
        (shown("COMPLETED", "0:0"), JobState("COMPLETED", 0), 0),
        (shown("FAILED", "75:0"), JobState("FAILED", 75), 75),
        (shown("CANCELLED", "0:15"), JobState("CANCELLED", 143), 143),
        (shown("NODE_FAIL", "0:0"), JobState("NODE_FAIL", 0), 1),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", JobState("FORGOTTEN", 1), 1),
    ],
)
def test_the_state_of_a_job(slurm, answer, state, exit_status):
    slurm("scontrol", answer)
    assert job_state("12") == state
    assert state.exit_status == exit_status


def test_a_controller_that_does_not_answer_tells_no_state(slurm, monkeypatch):
    monkeypatch.setattr(cluster_state, "LONGEST_ANSWER_S", 0.05)
    slurm("scontrol", "exec sleep 60")
    assert job_state("12") is None
    slurm("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert job_state("12") is None


def test_a_run_directory_is_one_jobs(slurm, tmp_path):
    run_dir = tmp_path / "run"
    check_no_other_job(run_dir)
    note_job(run_dir, "12", "big")
    assert json.loads((run_dir / "slurm" / "job.json").read_text())["job_id"] == "12"
    assert stat.S_IMODE((run_dir / "slurm").stat().st_mode) == 0o700
    slurm("scontrol", shown("PENDING", "0:0"))
    with pytest.raises(
        LaunchError, match=r"run: job 12 of it is PENDING: wait for it, end it \(scancel 12\) or choose"
    ):
        check_no_other_job(run_dir)
    slurm("scontrol", shown("FAILED", "1:0"))
    check_no_other_job(run_dir)
    Path(run_dir / "slurm" / "job.json").write_text("{}")
    check_no_other_job(run_dir)


def test_waiting_ends_with_the_worst_of_all_elements(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_state, "FIRST_LOOK_S", 0.01)
    asked = tmp_path / "asked"
    # The first element runs when it is looked at first, and fails later; a controller away is waited for.
    slurm(
        "scontrol",
        f"""echo $4 >> {asked}
[ $(wc -l < {asked}) != 3 ] || exit 1
[ $4 != 12_1 ] || {{ {shown("COMPLETED", "0:0")}; exit; }}
[ $(wc -l < {asked}) -gt 3 ] && {shown("FAILED", "3:0")} || {shown("RUNNING", "0:0")}""",
    )
    looks = []
    assert await_end(["12_0", "12_1"], lambda: looks.append(asked.read_text().split())) == 3
    assert looks == [["12_0", "12_1"], ["12_0", "12_1", "12_0"], ["12_0", "12_1", "12_0", "12_0"]]
