"""ZeRO over two nodes, submitted and interrupted, comes to the losses and samples of one plain process."""

import json
import subprocess
from pathlib import Path

import pytest
from cluster import Cluster
from forked_command import vitscale
from submitted_run import SubmittedRun, assert_as_if_alone, write_config

from vitscale.checkpoint import CheckpointStore

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 40
ENDS = ("COMPLETED", "FAILED", "CANCELLED")

# The folder as a node sees it that has so few bytes left for what it writes there; it reads what the others wrote.
FILL = """
set -e
mkdir "$0"
mount -t tmpfs -o size=64k tmpfs "$0"
mkdir "$0/upper" "$0/work"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$0/upper,workdir=$0/work" "$1"
"""
FREE = 'umount "$1" && umount "$0"'


def write(folder: Path, dataset: Path, stage: int) -> None:
    """A run that saves at every step, which makes it slow enough to meet it on its way."""
    quiet = {"drop_rate": 0.0, "drop_path_rate": 0.0}  # the masks of dropout depend on the ranks
    slow = {"peak_lr": 3e-4}  # a high rate makes rounding in another order grow
    steady = {"kind": "constant"}  # the first steps do not depend on how many there are to be
    write_config(
        folder, dataset, STEPS, every=1, model=quiet, optim=slow, schedule=steady, engine={"zero_stage": stage}
    )


@pytest.fixture(scope="module")
def oracle(tmp_path_factory, digits_dataset) -> Path:
    """The run directory of one process that trains without DeepSpeed."""
    folder = tmp_path_factory.mktemp("oracle")
    write(folder, digits_dataset, stage=0)
    done = vitscale("train", folder / "micro.yaml", "engine.kind=torch")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize(("stage", "preflight"), [(3, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_four_ranks_that_are_requeued_come_to_what_one_process_does(
    cluster: Cluster, digits_dataset, oracle, tmp_path, stage, preflight
):
    write(tmp_path, digits_dataset, stage)
    run = SubmittedRun(cluster, tmp_path, ranks_per_node=2, preflight=preflight)
    run.wait(lambda: run.saved_step >= 2, limit_s=240)
    cluster.run(["scontrol", "requeue", run.job_id])
    job = cluster.wait_for_job(run.job_id, ENDS, limit_s=240)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.log
    assert f"goes on from {run.run_dir}/checkpoints/step-" in run.log
    checked = {path.parent.name for path in run.run_dir.glob("slurm/preflight/*/report.json")}
    assert checked == ({f"{run.job_id}.0", f"{run.job_id}.1"} if preflight else set())
    assert len(list((run.run_dir / "samples").iterdir())) == 4
    assert_as_if_alone(run.run_dir, oracle, STEPS, rel=1e-5)


@pytest.mark.fault(6)
def test_a_disk_that_is_full_on_one_node_ends_the_run_until_there_is_room(
    cluster: Cluster, digits_dataset, oracle, tmp_path
):
    write(tmp_path, digits_dataset, stage=3)
    done = vitscale("train", tmp_path / "micro.yaml", "schedule.length=3")
    assert done.returncode == 0, done.stderr
    disk, checkpoints = tmp_path / "disk", tmp_path / "run" / "checkpoints"
    subprocess.run(cluster.on_node("vsn2", ["bash", "-c", FILL, disk, checkpoints]), check=True)

    run = SubmittedRun(cluster, tmp_path, "--allow-change", "schedule.length")
    job = cluster.wait_for_job(run.job_id, ENDS, limit_s=180)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), run.log
    told = (
        f"{checkpoints}: rank-00001.safetensors of step 4 cannot be written on vsn2: No space left on device: "
        "mend that and run the same command again, older checkpoints are intact"
    )
    assert json.loads((run.run_dir / "exit.json").read_text())["reason"] == told
    logs = [path.read_text() for path in run.run_dir.glob("slurm/*.out")]
    assert sum(log.count(f"error: {told}\n") for log in logs) == 1
    assert not any("Traceback" in log for log in logs)
    store = CheckpointStore(run.run_dir)
    assert {tag: store.faults(tag) for tag in store.tags()} == {"step-00000002": [], "step-00000003": []}

    subprocess.run(cluster.on_node("vsn2", ["bash", "-c", FREE, disk, checkpoints]), check=True)
    again = SubmittedRun(cluster, tmp_path, "--allow-change", "schedule.length")
    assert cluster.wait_for_job(again.job_id, ENDS, limit_s=180)["JobState"] == "COMPLETED", again.log
    assert f"goes on from {checkpoints}/step-00000003" in again.log
    assert_as_if_alone(run.run_dir, oracle, STEPS, rel=1e-5)
