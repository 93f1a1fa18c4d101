"""A preemption from beginning to end on a real cluster, command by command, as docs/slurm.md shows it.

`PYTHONPATH=tests python tests/slurm/preemption_story.py` plays it on two nodes that it brings up (root, Debian's Slurm)
and writes what was typed and what was answered into that page. Only paths are shortened.
"""

import re
import sys
import tempfile
import time
from pathlib import Path

from cluster import Cluster, started_cluster
from fault_table import with_part
from micro_run import REPOSITORY
from submitted_run import ONE_THREAD, SubmittedRun, write_config, write_dataset

PAGE = REPOSITORY / "docs" / "slurm.md"
BEGIN, END = "<!-- story: written by tests/slurm/preemption_story.py -->", "<!-- end of story -->"
STEPS, EVERY = 300, 100
NOISE = re.compile(r"^(submitit INFO|\[rank\d+\]:W|DeepSpeed deepspeed\.ops|srun: got SIGCONT)")
LOAD = (
    "import timm, torch; m = timm.create_model('local-dir:export', pretrained=True).eval(); "
    "print(m.pretrained_cfg['architecture'], tuple(m(torch.zeros(1, 3, 16, 16)).shape))"
)


class Story:
    """What was typed and answered so far, with the seconds since the beginning."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.lines: list[str] = []
        self._cluster = cluster
        self._folder = folder
        self._began_s = time.monotonic()

    def run(self, *command: str, shown: str = "", keep: int = 99) -> str:
        """Run a command on the head and keep it with the end of its answer."""
        words = [sys.executable if word == "python" else word for word in command]
        words = [sys.executable, "-m", "vitscale", *words[1:]] if words[0] == "vitscale" else words
        answer = self._cluster.run(words, cwd=self._folder, **ONE_THREAD).stdout
        self.tell(shown or " ".join(command), answer, keep)
        return answer

    def tell(self, typed: str, answer: str, keep: int = 99) -> None:
        """Keep what was typed, when, and the last lines of the answer."""
        lines = [line for line in answer.rstrip().splitlines() if not NOISE.match(line)]
        seconds = time.monotonic() - self._began_s
        self.lines += [f"[{seconds:5.1f} s] $ {typed}", *map(self._short, lines[-keep:])]

    def _short(self, line: str) -> str:
        return line.replace(f"{self._folder}/", "").replace(f"{REPOSITORY}/", "").rstrip()


def play(cluster: Cluster, folder: Path) -> list[str]:
    """Submit, preempt, wait for the job to come back and end, export: the lines of the story."""
    story = Story(cluster, folder)
    queue = ("squeue", "--format=%.6i %.9P %.8j %.2t %.6M %.5D %R")
    run = SubmittedRun(cluster, folder, ranks_per_node=2, preflight=True)
    story.tell("python launch/submit.py micro.yaml --nodes 2 --tasks-per-node 2", run.told)
    run.wait(lambda: run.steps >= 3)
    story.tell(f"tail -n 8 run/slurm/{run.job_id}_0_log.out", run.log, keep=8)
    urgent = story.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 3").split()[-1]
    run.wait(lambda: run.job["JobState"] == "PENDING" or run.job["Restarts"] == "1")
    before = len(run.log.splitlines())
    story.tell(f"tail -n 6 run/slurm/{run.job_id}_0_log.out", run.log, keep=6)
    story.run(*queue)
    story.run("vitscale", "runs", "run")
    cluster.wait_for_job(urgent, ["COMPLETED"], limit_s=60)
    run.wait_for_start(1)
    after = "\n".join(run.log.splitlines()[before:])
    story.tell(f"tail -n +{before + 1} run/slurm/{run.job_id}_0_log.out", after)
    cluster.wait_for_job(run.job_id, ["COMPLETED"], limit_s=240)
    story.tell(f"tail -n 3 run/slurm/{run.job_id}_0_log.out", run.log, keep=3)
    story.run("vitscale", "runs", "run")
    story.run("vitscale", "checkpoint", "list", "run")
    story.run("vitscale", "export", "run", "--format", "timm", "--features-only", "--verify", "--out", "export")
    story.run("python", "-c", LOAD, shown=f'python -c "{LOAD}"')
    return story.lines


def main() -> None:
    """Play it and write it into the page."""
    with tempfile.TemporaryDirectory() as name, started_cluster(nodes=2) as cluster:
        folder = Path(name)
        write_config(folder, write_dataset(folder), STEPS, EVERY)
        lines = play(cluster, folder)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_part(page, BEGIN, END, "\n".join(["```", *lines, "```"])), encoding="utf-8")


if __name__ == "__main__":
    main()
