"""How long the parts of a launch take on a real cluster of two nodes, as a table for docs/benchmarks.

`PYTHONPATH=tests python tests/slurm/launch_figures.py`, on a machine that does nothing else (root, Debian's Slurm).
Each figure is the median of some rounds, with the least and the most.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster, started_cluster
from submitted_run import SubmittedRun, write_config, write_dataset

ROUNDS = 3
STEPS, EVERY = 100_000, 100
"""More than are ever done."""


class Clock:
    """Seconds by what they are of, each counted from the word before."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._last_s = 0.0

    def begin(self) -> None:
        """Count from here."""
        self._last_s = time.monotonic()

    def keep(self, what: str, met: Callable[[], bool] = lambda: True, limit_s: float = 120) -> None:
        """Wait until something is so, and keep the seconds that it took."""
        deadline_s = time.monotonic() + limit_s
        while not met():
            assert time.monotonic() < deadline_s, f"{what}: not within {limit_s} s"
            time.sleep(0.02)
        now_s = time.monotonic()
        self.seconds[what].append(now_s - self._last_s)
        self._last_s = now_s

    def table(self) -> str:
        """A row for each."""
        rows = [
            f"| {what} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) |"
            for what, values in self.seconds.items()
        ]
        return "\n".join(["| | seconds |", "|---|--:|", *rows])


def measure(clock: Clock, cluster: Cluster, folder: Path) -> None:
    """One round: submit, preflight, requeue, lose a node; the job is cancelled in the end."""
    clock.begin()
    run = SubmittedRun(cluster, folder, preflight=True)
    clock.keep("submit.py, from the command to its answer")
    run.wait(lambda: run.job["JobState"] == "RUNNING")
    clock.begin()
    clock.keep("preflight of two nodes", lambda: "2 nodes x 1 ranks" in run.log)
    run.wait(lambda: run.steps >= 20)

    clock.begin()
    cluster.run(["scontrol", "requeue", run.job_id])
    clock.keep("requeue: from the signal to the commit", lambda: "stopped at step" in run.log)
    came_back(clock, run, 1, "requeue")

    lost = run.nodes()[1]
    cluster.kill_node(lost)
    run.wait(lambda: run.job["JobState"] == "PENDING")
    clock.begin()
    cluster.boot_node(lost)
    came_back(clock, run, 2, "lost node, from its boot")
    cluster.run(["scancel", run.job_id])
    cluster.wait_for_job(run.job_id, ["CANCELLED"], limit_s=60)


def came_back(clock: Clock, run: SubmittedRun, restarts: int, why: str) -> None:
    """The parts of a start that follows an end."""

    def said(words: str) -> Callable[[], bool]:
        return lambda: run.log.count(words) > restarts

    before = run.saved_step
    state = lambda: (run.job["Restarts"], run.job["JobState"]) == (str(restarts), "RUNNING")  # noqa: E731
    clock.keep(f"{why}: until Slurm starts the job again", state)
    clock.keep(f"{why}: preflight", said("2 nodes x 1 ranks"))
    clock.keep(f"{why}: srun, Python, submitit", said("Starting with JobEnvironment"))
    clock.keep(f"{why}: imports, rendezvous, engine", said("engine deepspeed"))
    clock.keep(f"{why}: checkpoint, data, first step", lambda: run.steps > before)


def main() -> None:
    """Print the table."""
    clock = Clock()
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name, started_cluster(nodes=2) as cluster:
            folder = Path(name)
            write_config(folder, write_dataset(folder), STEPS, EVERY)
            measure(clock, cluster, folder)
    print(clock.table())


if __name__ == "__main__":
    main()
