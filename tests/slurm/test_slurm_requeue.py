"""What becomes of a job by the way its ranks end: on a real cluster, with a stand-in for `vitscale train`.

Jobs are submitted from a checkout of their own, in which the stand-in takes the place of vitscale's command line.
"""

import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]

# `python -m vitscale preflight` takes a node for sound that no file broken.<node> tells of.
STAND_IN = """
import json, os, signal, socket, sys, time
from pathlib import Path

rank = int(os.environ.get("SLURM_PROCID", 0))
attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0))
node = socket.gethostname()

def started():
    Path(f"started.{attempt}.{rank}").write_text(f"{node} {os.environ['SLURM_NTASKS']}")

def stop_on(signum):
    signal.signal(signum, lambda *_: sys.exit(75))

def tell(status):
    Path(os.environ["VITSCALE_EXIT_FILE"]).write_text(json.dumps({"status": status, "reason": "stand-in"}))

def report(folder):
    assert not Path(f"broken.{node}").exists()
    Path(folder, f"{node}.{rank}").touch()

def choose(folder, nodes, fewest, tasks):
    found = sorted({path.name.split(".")[0] for path in Path(folder).glob("vsn*")})[:int(nodes)]
    Path(folder, "hosts").write_text("".join(f"{name}\\n" * int(tasks) for name in found))
    sys.exit(0 if len(found) >= int(fewest) else 1)

def main(arguments=None):
    words = arguments or sys.argv[1:]
    if "--report" in words:
        report(words[-1])
    elif "--choose" in words:
        choose(*words[-7::2])
    else:
        train(words[1])

def train(config):
"""

CONFIG = """
run: {dir: run}
model: {name: vit_tiny_patch16_224, num_classes: 2}
data: {train: {path: shards, split: train}}
batch: {global_batch: 4, micro_batch: 2}
optim: {peak_lr: 1e-3}
schedule: {length: 10}
"""


class Checkout:
    """A working directory with a config, and the code it is submitted with."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._code = folder / "checkout"
        for package in ("vitscale", "data_tools", "launch"):
            shutil.copytree(REPOSITORY / package, self._code / package, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "config.yaml").write_text(CONFIG)

    def write(self, body: str) -> None:
        """Let the ranks do `body` in place of training."""
        lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
        (self._code / "vitscale" / "cli" / "main.py").write_text(f"{STAND_IN}{lines}")

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run submit.py, for two nodes with one rank each unless told otherwise."""
        command = [sys.executable, self._code / "launch" / "submit.py", "config.yaml", "--nodes", "2", *options]
        return self._cluster.run(command, check=False, cwd=self._folder, PYTHONPATH=str(self._code))

    def submit(self, *options: str) -> str:
        """The id of the job that `run` submits."""
        done = self.run(*options)
        assert done.returncode == 0, done.stderr
        words = done.stdout.split()
        assert words[0] == "job"
        return words[1].rstrip(":")


@pytest.fixture
def checkout(cluster: Cluster, tmp_path: Path) -> Checkout:
    return Checkout(cluster, tmp_path)


@pytest.fixture
def submit(checkout: Checkout):
    """Submit ranks that do `body` in place of training, without a preflight; gives the job's id."""

    def submit_job(body: str, *options: str) -> str:
        checkout.write(body)
        return checkout.submit("--no-preflight", *options)

    return submit_job


def await_files(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 120
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, "the job does not start"
        time.sleep(0.05)


def ended(cluster: Cluster, job_id: str) -> tuple[str, str, str]:
    """State, exit status and number of restarts of a job, once it has ended."""
    job = cluster.wait_for_job(job_id, ["COMPLETED", "FAILED", "CANCELLED"], limit_s=120)
    return job["JobState"], job["ExitCode"].split(":")[0], job["Restarts"]


def test_killed_rank_0_is_requeued(cluster, submit):
    job_id = submit("""
if attempt == 0 and rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(1 if attempt == 0 else 0)
""")
    assert ended(cluster, job_id) == ("COMPLETED", "0", "1")


def test_time_limit_is_told_and_counted(cluster, submit):
    job_id = submit(
        """
stop_on(signal.SIGUSR2)
time.sleep(60)
""",
        *["--time", "2", "--signal-delay", "115", "--max-timeouts", "0"],
    )
    assert ended(cluster, job_id) == ("FAILED", "75", "0")


@pytest.mark.parametrize("status", [2, 3])
def test_error_that_no_other_try_mends_fails_the_job_at_once(cluster, submit, status):
    job_id = submit(f"sys.exit({status} if rank == 1 else 1)")
    assert ended(cluster, job_id) == ("FAILED", str(status), "0")


def test_word_of_rank_0_counts_more_than_how_the_others_end(cluster, submit):
    job_id = submit("""
if rank == 0:
    tell(3)
    sys.exit(3)
os.kill(os.getpid(), signal.SIGKILL)
""")
    assert ended(cluster, job_id) == ("FAILED", "3", "0")


def test_cancelled_job_stays_cancelled(cluster, submit, tmp_path):
    job_id = submit("""
stop_on(signal.SIGTERM)
started()
time.sleep(60)
""")
    await_files(tmp_path, "started.0.0", "started.0.1")
    cluster.run(["scancel", job_id])
    assert ended(cluster, job_id)[::2] == ("CANCELLED", "0")


@pytest.mark.slow  # a limit is a minute at least, and that long before it the job is requeued
def test_ranks_that_outlast_the_time_limit_are_requeued_before_it(cluster, submit):
    job_id = submit(
        """
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
time.sleep(600 if attempt == 0 else 0)
sys.exit(0)
""",
        *["--time", "2", "--signal-delay", "115"],
    )
    job = cluster.wait_for_job(job_id, ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"], limit_s=200)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")


def test_signals_belong_to_the_trainer(cluster, submit, tmp_path):
    job_id = submit("""
started()
while attempt == 0 and not Path("ready").exists():
    time.sleep(0.05)
stop_on(signal.SIGUSR2)
time.sleep(60 if attempt == 0 else 0)
sys.exit(0)
""")
    await_files(tmp_path, "started.0.0", "started.0.1")
    cluster.run(["scancel", "--signal=USR2", job_id])  # before there is a handler
    time.sleep(0.5)
    assert cluster.job(job_id)["JobState"] == "RUNNING"
    (tmp_path / "ready").touch()
    assert ended(cluster, job_id) == ("COMPLETED", "0", "1")


def test_element_that_is_to_run_again_is_requeued_alone_and_counts_as_no_timeout(cluster, submit, tmp_path):
    job_id = submit(
        """
point = int(os.environ["SLURM_ARRAY_TASK_ID"])
Path(f"point.{point}.{attempt}").write_text(Path(config).read_text())
sys.exit(75 if point == 1 and attempt == 0 else 0)
""",
        *["--sweep", "optim.peak_lr=1e-3,2e-3", "--max-timeouts", "0"],
    )
    await_files(tmp_path, "point.1.1")
    assert [ended(cluster, f"{job_id}_{point}") for point in (0, 1)] == [
        ("COMPLETED", "0", "0"),
        ("COMPLETED", "0", "1"),
    ]
    assert sorted(path.name for path in tmp_path.glob("point.*")) == ["point.0.0", "point.1.0", "point.1.1"]
    for point, rate in enumerate(("0.001", "0.002")):
        config = (tmp_path / f"point.{point}.0").read_text()
        assert f"peak_lr: {rate}\n" in config
        assert f"dir: run/optim.peak_lr-{point + 1}e-3\n" in config


@pytest.mark.fault(14)
def test_waiting_job_runs_what_was_submitted_and_has_its_run_directory_alone(cluster, checkout, tmp_path):
    cluster.run(["scontrol", "update", "partition=test", "state=down"])
    try:
        checkout.write("Path('ran').write_text('what was submitted: ' + Path(config).read_text())\nsys.exit(0)")
        job_id = checkout.submit("--no-preflight")
        checkout.write("Path('ran').write_text('what was saved later')\nsys.exit(0)")
        (tmp_path / "config.yaml").write_text(CONFIG.replace("1e-3", "2e-3"))
        shutil.copytree(tmp_path / "checkout" / "vitscale", tmp_path / "vitscale")  # `python -m` would take this first
        again = checkout.run("--no-preflight")
        assert again.returncode == 2
        assert again.stderr.startswith(
            f"error: run: job {job_id} of it is PENDING: wait for it, end it (scancel {job_id})"
        )
    finally:
        cluster.run(["scontrol", "update", "partition=test", "state=up"])
    assert ended(cluster, job_id) == ("COMPLETED", "0", "0")
    ran = (tmp_path / "ran").read_text()
    assert ran.startswith("what was submitted: ")
    assert "peak_lr: 0.001\n" in ran
    assert stat.S_IMODE((tmp_path / "run" / "slurm").stat().st_mode) == 0o700


def test_spare_node_takes_the_place_of_a_broken_one(cluster, checkout, tmp_path):
    (tmp_path / "broken.vsn1").touch()
    checkout.write("started()\nsys.exit(0)")
    job_id = checkout.submit("--nodes", "1", "--spare-nodes", "1", "--tasks-per-node", "2")
    assert ended(cluster, job_id) == ("COMPLETED", "0", "0")
    assert {path.name: path.read_text() for path in tmp_path.glob("started.*")} == {
        "started.0.0": "vsn2 2",
        "started.0.1": "vsn2 2",
    }


def test_too_few_sound_nodes_are_tried_again_and_all_are_used_then(cluster, checkout, tmp_path):
    (tmp_path / "broken.vsn2").touch()
    checkout.write("started()\nsys.exit(0)")
    job_id = checkout.submit()
    deadline = time.monotonic() + 120
    while cluster.job(job_id)["Restarts"] == "0":
        assert time.monotonic() < deadline, "the job is not requeued"
        time.sleep(0.05)
    (tmp_path / "broken.vsn2").unlink()
    assert ended(cluster, job_id) == ("COMPLETED", "0", "1")
    assert [(tmp_path / f"started.1.{rank}").read_text() for rank in (0, 1)] == ["vsn1 2", "vsn2 2"]


def test_job_starts_on_fewer_nodes_when_one_is_away(cluster, checkout, tmp_path):
    checkout.write("started()\nsys.exit(0)")
    cluster.run(["scontrol", "update", "nodename=vsn1", "state=drain", "reason=test"])
    try:
        job_id = checkout.submit("--min-nodes", "1")
        assert ended(cluster, job_id) == ("COMPLETED", "0", "0")
    finally:
        cluster.run(["scontrol", "update", "nodename=vsn1", "state=resume"])
    assert [(path.name, path.read_text()) for path in tmp_path.glob("started.*")] == [("started.0.0", "vsn2 1")]


def test_follow_prints_the_log_and_ends_with_the_status_of_the_job(cluster, checkout):
    checkout.write("print('words of rank', rank)\nsys.exit(3)")
    done = checkout.run("--no-preflight", "--follow")
    assert done.returncode == 3, done.stderr
    assert "words of rank 0\n" in done.stdout
    assert "words of rank 1\n" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "nope"], "error: --partition nope: this cluster has none: use test"),
        (["--nodes", "3"], "error: --nodes 3: partition test has at most 2 nodes"),
    ],
)
def test_what_the_cluster_cannot_run_is_refused(checkout, options, message):
    done = checkout.run("batch.global_batch=12", *options)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
