"""What Slurm says of its partitions and of a job."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from job_request import JobRequest, time_limit_min

from vitscale.errors import ExitStatus, LaunchError

FORGOTTEN = "FORGOTTEN"
"""Not Slurm's word: a job that the controller has no record of any more, or never had."""
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
    FORGOTTEN,
}  # fmt: skip
FIRST_LOOK_S, LONGEST_LOOK_S = 0.5, 20.0
LONGEST_ANSWER_S = 120.0


@dataclass(frozen=True)
class Partition:
    """The largest that jobs in it can ask for."""

    nodes: int
    cpus: int
    """Of a node."""
    gpus: int
    """Of a node."""
    time_min: int | None
    """None without a limit."""


def read_partitions(sinfo: str) -> tuple[dict[str, Partition], str | None]:
    """Partitions by name, and the default one's, from lines `name|nodes|cpus|gres|time` as sinfo prints them."""
    found: dict[str, Partition] = {}
    default = None
    for line in filter(None, sinfo.splitlines()):
        name, nodes, cpus, gres, time_limit = line.split("|")
        if name.endswith("*"):
            name = default = name.removesuffix("*")
        gpus = sum(int(count) for count in re.findall(r"\bgpu:(?:[\w.-]+:)?(\d+)", gres))
        before = found.get(name, Partition(0, 0, 0, None))
        limit = None if time_limit == "infinite" else time_limit_min(time_limit)
        found[name] = Partition(before.nodes + int(nodes), max(before.cpus, int(cpus)), max(before.gpus, gpus), limit)
    return found, default


def check_partition(request: JobRequest, partitions: dict[str, Partition], default: str | None) -> None:
    """See that a partition, or one of several with commas between, can ever run the job.

    Raises:
        LaunchError: there is none of that name, or all have less than is asked for.
    """
    names = (request.partition or default or "").split(",")
    if names == [""]:
        return  # Slurm says what is missing
    for name in names:
        if name not in partitions:
            raise LaunchError(f"--partition {name}: this cluster has none: use {' or '.join(sorted(partitions))}")
    lacks = [_lack(request, name, partitions[name]) for name in names]
    if all(lacks):
        raise LaunchError(lacks[0])


def _lack(request: JobRequest, name: str, partition: Partition) -> str:
    """What a partition has less of than is asked for, and the mend; empty if nothing."""
    cpus = request.ranks_per_node * (request.cpus_per_task or 1)
    time_min = time_limit_min(request.time)
    asked = {
        f"--nodes {request.nodes}" + (f" --spare-nodes {request.spare_nodes}" if request.spare_nodes else ""): (
            request.most_nodes, partition.nodes, "nodes",
        ),
        f"--gpus-per-node {request.gpus_per_node}": (request.gpus_per_node or 0, partition.gpus, "GPUs a node"),
        f"--tasks-per-node {request.ranks_per_node} --cpus-per-task {request.cpus_per_task or 1}": (
            cpus, partition.cpus, "CPUs a node",
        ),
        f"--time {request.time}": (time_min, partition.time_min or time_min, "minutes"),
    }  # fmt: skip
    for option, (wanted, most, what) in asked.items():
        if wanted > most:
            return f"{option}: partition {name} has at most {most} {what}: ask for less, or for another"
    return ""


def check_cluster(request: JobRequest) -> None:
    """The same against the cluster of this machine; where sinfo does not answer, sbatch will say more.

    Raises:
        LaunchError: the job could never run.
    """
    done = _ask("sinfo", "--all", "--noheader", "--exact", "--format=%P|%D|%c|%G|%l")
    if done.returncode == 0 and done.stdout:
        check_partition(request, *read_partitions(done.stdout))


def note_job(run_dir: Path, job_id: str, name: str) -> None:
    """Leave word in a run directory of the job that is to train in it."""
    record = {"job_id": job_id, "name": name, "submitted": time.strftime("%Y-%m-%d %H:%M:%S")}
    folder = run_dir / "slurm"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def check_no_other_job(run_dir: Path) -> None:
    """See that no job waits for a run directory or trains in it.

    Raises:
        LaunchError: one does.
    """
    try:
        job_id = str(json.loads((run_dir / "slurm" / "job.json").read_text(encoding="utf-8"))["job_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    state = job_state(job_id)
    if state is not None and state.name not in OVER:
        raise LaunchError(
            f"{run_dir}: job {job_id} of it is {state.name}: wait for it, end it (scancel {job_id}) or choose another "
            "run.dir"
        )


@dataclass(frozen=True)
class JobState:
    """Of a job that the controller knows."""

    name: str
    status: int
    """Exit status of its batch script, as a shell gives it."""

    @property
    def exit_status(self) -> int:
        """What a launcher ends with once the job is over; never 0 unless it was completed."""
        return self.status if self.status or self.name == "COMPLETED" else int(ExitStatus.TRANSIENT)


def job_state(job_id: str) -> JobState | None:
    """State of a job, or of one element of an array; None while the controller does not answer."""
    done = _ask("scontrol", "--oneliner", "show", "job", job_id)
    if "Invalid job id" in done.stderr:
        return JobState(FORGOTTEN, int(ExitStatus.TRANSIENT))
    state = re.search(r"\bJobState=(\w+)", done.stdout)
    ended = re.search(r"\bExitCode=(\d+):(\d+)", done.stdout)
    if done.returncode != 0 or state is None or ended is None:
        return None
    code, signal = int(ended[1]), int(ended[2])
    return JobState(state[1], code or (128 + signal if signal else 0))


def await_end(job_ids: Sequence[str], look: Callable[[], None]) -> int:
    """Wait until the jobs are over; the highest of their statuses.

    Args:
        job_ids: jobs or elements of an array.
        look: called each time that they are looked at, and once more at the end.
    """
    pause_s, highest, waiting = FIRST_LOOK_S, 0, list(job_ids)
    while True:
        for job_id in list(waiting):
            state = job_state(job_id)
            if state is not None and state.name in OVER:
                highest = max(highest, state.exit_status)
                waiting.remove(job_id)
        look()
        if not waiting:
            return highest
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LONGEST_LOOK_S)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_ANSWER_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer")
