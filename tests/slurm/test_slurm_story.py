"""One run's life on a real cluster, and what it comes to: the losses and samples of a run that was left alone."""

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster import GRACE_S, Cluster, started_cluster
from micro_run import REPOSITORY, micro_tree

from vitscale.train.ledger import read_ledger

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SUBMIT = REPOSITORY / "launch" / "submit.py"
STEPS, EVERY = 400, 10


@pytest.fixture
def three_nodes() -> Iterator[Cluster]:
    with started_cluster(nodes=3) as cluster:
        yield cluster


class SubmittedRun:
    """A run of two nodes with one rank each, as a user sees it."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str) -> None:
        self.run_dir = folder / "run"
        submit = [
            sys.executable,
            REPOSITORY / "launch/submit.py",
            "micro.yaml",
            "--nodes",
            "2",
            "--tasks-per-node",
            "1",
        ]
        said = cluster.run([*submit, "--no-preflight", *options], cwd=folder).stdout
        self.job_id = re.match(r"job +(\d+):", said)[1]
        self._cluster = cluster

    @property
    def log(self) -> str:
        path = self.run_dir / "slurm" / f"{self.job_id}_0_log.out"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def steps(self) -> int:
        return max(losses(self.run_dir), default=0)

    @property
    def job(self) -> dict[str, str]:
        return self._cluster.job(self.job_id)

    @property
    def saved_step(self) -> int:
        tags = (self.run_dir / "checkpoints").glob("step-*/manifest.json")
        return max((int(manifest.parent.name.removeprefix("step-")) for manifest in tags), default=0)

    def nodes(self) -> list[str]:
        """Nodes of the current start, the batch script's first."""
        return self._cluster.run(["scontrol", "show", "hostnames", self.job["NodeList"]]).stdout.split()

    def wait(self, met: Callable[[], bool], limit_s: float = 120) -> float:
        """Wait until something is so; gives the seconds it took."""
        began_s = time.monotonic()
        while not met():
            assert time.monotonic() < began_s + limit_s, f"{self.job}\n{self.log[-4000:]}"
            time.sleep(0.05)
        return time.monotonic() - began_s

    def wait_for_start(self, restarts: int) -> float:
        """Wait until the start of that number takes steps; gives the seconds it took."""
        before = self.steps
        self.wait(lambda: self.job["Restarts"] == str(restarts) and self.job["JobState"] == "RUNNING")
        return self.wait(lambda: self.steps > max(before, self.saved_step))


def losses(run_dir: Path) -> dict[int, float]:
    """The loss by step, so far; a step that was done again has its last."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def write_config(folder: Path, dataset: Path) -> None:
    tree = micro_tree(dataset, folder / "run")
    del tree["data"]["val"]
    tree["schedule"]["length"] = STEPS
    tree["checkpoint"] = {"every_steps": EVERY}
    tree["log"] |= {"pictures": 0}
    tree["watchdog"] = {"step_s": 10, "data_s": 9, "save_s": 30, "beat_s": 0.5, "answer_s": 2}
    (folder / "micro.yaml").write_text(yaml.safe_dump(tree))


@contextlib.contextmanager
def undisturbed(folder: Path) -> Iterator[Path]:
    """The same config by torchrun on this machine, beside what the block does; gives its run directory."""
    torchrun = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "-m", "vitscale", "train", "micro.yaml", "run.dir=alone"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield folder / "alone"
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()


def assert_as_if_alone(run_dir: Path, alone: Path) -> None:
    assert losses(run_dir) == losses(alone)
    assert losses(run_dir).keys() == set(range(1, STEPS + 1))
    ledger, expected = read_ledger(run_dir), read_ledger(alone)
    assert {step: sorted(keys) for step, keys in ledger.items()} == {s: sorted(keys) for s, keys in expected.items()}


@pytest.fixture
def run(three_nodes, digits_dataset, tmp_path, monkeypatch) -> SubmittedRun:
    """A run that has done its first steps."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it: the number of threads decides the last bits
    write_config(tmp_path, digits_dataset)
    run = SubmittedRun(three_nodes, tmp_path)
    run.wait(lambda: run.steps >= 3)
    return run


@pytest.mark.fault(16, 21, 22)
def test_a_run_outlives_what_befalls_a_cluster(three_nodes, run, tmp_path):
    # The controller restarts: the job does not notice.
    three_nodes.restart_controller()
    seen = run.steps
    run.wait(lambda: run.steps > seen)
    assert (run.job["JobState"], run.job["Restarts"]) == ("RUNNING", "0")

    # A job of a higher partition wants the nodes: a checkpoint within half the grace, and the run is back afterwards.
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    asked_s = time.monotonic()
    urgent_id = three_nodes.run([*urgent, "--wrap=sleep 1"]).stdout.strip()
    run.wait(lambda: "stopped at step" in run.log)
    committed_s = time.monotonic() - asked_s
    stopped = run.saved_step
    assert committed_s <= GRACE_S / 2
    three_nodes.wait_for_job(urgent_id, ["COMPLETED"], limit_s=60)
    back_s = run.wait_for_start(1)
    assert f"goes on from {run.run_dir}/checkpoints/step-{stopped:08d}" in run.log

    # A node loses its power: the run goes on with the third.
    lost = run.nodes()[1]
    three_nodes.kill_node(lost)
    killed_s = time.monotonic()
    with undisturbed(tmp_path) as alone:
        run.wait_for_start(2)
        lost_s = time.monotonic() - killed_s
        assert lost not in run.nodes()
        three_nodes.wait_for_job(run.job_id, ["COMPLETED"], limit_s=240)
    assert_as_if_alone(run.run_dir, alone)
    print(f"committed {committed_s:.1f} s after the request, back {back_s:.1f} s, without the lost node {lost_s:.1f} s")


@pytest.mark.slow
@pytest.mark.fault(15, 21)
def test_ranks_that_live_on_behind_a_cut_cable_count_for_nothing(three_nodes, run, tmp_path):
    for restart, which in ((1, 1), (2, 0)):  # the second node of the job, then the one with rank 0 and the batch script
        cut = run.nodes()[which]
        three_nodes.cut(cut)
        run.wait_for_start(restart)
        assert cut not in run.nodes()
        three_nodes.plug_in_again(cut)
    with undisturbed(tmp_path) as alone:
        three_nodes.wait_for_job(run.job_id, ["COMPLETED"], limit_s=240)
    assert_as_if_alone(run.run_dir, alone)
