"""What becomes of a job by the way its ranks end: on a real cluster, with a stand-in for `vitscale train`.

The stand-in is found before vitscale because a job's working directory comes first on Python's path.
"""

import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]

PROLOGUE = """
import os, signal, sys, time
from pathlib import Path

rank = int(os.environ["SLURM_PROCID"])
attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0))

def started():
    Path(f"started.{attempt}.{rank}").touch()

def stop_on(signum):
    signal.signal(signum, lambda *_: sys.exit(75))
"""

CONFIG = """
run: {dir: run}
model: {name: vit_tiny_patch16_224, num_classes: 2}
data: {train: {path: shards, split: train}}
batch: {global_batch: 4, micro_batch: 2}
optim: {peak_lr: 1e-3}
schedule: {length: 10}
"""


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path):
    """Submit two ranks on two nodes that run `body` in place of the trainer; gives the job's id."""

    def submit_job(body: str, *options: str) -> str:
        package = tmp_path / "vitscale"
        (package / "cli").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "errors.py").symlink_to(REPOSITORY / "vitscale" / "errors.py")
        (package / "cli" / "__init__.py").touch()
        lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
        (package / "cli" / "main.py").write_text(f"{PROLOGUE}\ndef main(arguments):\n{lines}")
        (tmp_path / "config.yaml").write_text(CONFIG)
        command = [sys.executable, REPOSITORY / "launch" / "submit.py", "config.yaml"]
        command += ["--nodes", "2", "--tasks-per-node", "1", *options]
        words = cluster.run(command, cwd=tmp_path).stdout.split()
        assert words[0] == "job"
        return words[1].rstrip(":")

    return submit_job


def await_start(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while len(list(folder.glob("started.0.*"))) < 2:
        assert time.monotonic() < deadline, "the job does not start"
        time.sleep(0.05)


def ended(cluster: Cluster, job_id: str) -> tuple[str, str, str]:
    """State, exit status and number of restarts of a job, once it has ended."""
    job = cluster.wait_for_job(job_id, ["COMPLETED", "FAILED", "CANCELLED"], limit_s=60)
    return job["JobState"], job["ExitCode"].split(":")[0], job["Restarts"]


def test_run_again_is_requeued_until_finished(cluster, submit):
    job_id = submit("sys.exit(75 if attempt < 1 else 0)")
    assert ended(cluster, job_id) == ("COMPLETED", "0", "1")


def test_killed_rank_0_is_requeued(cluster, submit):
    job_id = submit("""
if attempt == 0 and rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(1 if attempt == 0 else 0)
""")
    assert ended(cluster, job_id) == ("COMPLETED", "0", "1")


def test_requeues_are_limited(cluster, submit):
    job_id = submit("sys.exit(1)", "--max-requeues", "1")
    assert ended(cluster, job_id) == ("FAILED", "1", "1")


@pytest.mark.parametrize("status", [2, 3])
def test_error_that_no_other_try_mends_fails_the_job_at_once(cluster, submit, status):
    job_id = submit(f"sys.exit({status} if rank == 1 else 1)")
    assert ended(cluster, job_id) == ("FAILED", str(status), "0")


def test_cancelled_job_stays_cancelled(cluster, submit, tmp_path):
    job_id = submit("""
stop_on(signal.SIGTERM)
started()
time.sleep(60)
""")
    await_start(tmp_path)
    cluster.run(["scancel", job_id])
    assert ended(cluster, job_id)[::2] == ("CANCELLED", "0")


def test_signals_belong_to_the_trainer(cluster, submit, tmp_path):
    job_id = submit("""
started()
while attempt == 0 and not Path("ready").exists():
    time.sleep(0.05)
stop_on(signal.SIGUSR2)
Path(f"installed.{rank}").touch()
time.sleep(60 if attempt == 0 else 0)
sys.exit(0)
""")
    await_start(tmp_path)
    cluster.run(["scancel", "--signal=USR2", job_id])
    time.sleep(0.5)
    cluster.run(["scancel", "--signal=TERM", job_id])
    (tmp_path / "ready").touch()
    while not all((tmp_path / f"installed.{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)
    assert cluster.job(job_id)["JobState"] == "RUNNING"
    cluster.run(["scancel", "--signal=USR2", job_id])
    assert ended(cluster, job_id) == ("COMPLETED", "0", "1")
