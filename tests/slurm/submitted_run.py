"""A run that submit.py hands to a test cluster, and the same run that nobody disturbs."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from micro_run import REPOSITORY, losses, micro_tree, write_class_tars

from vitscale.train.ledger import read_ledger

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""The number of threads decides the last bits."""


class SubmittedRun:
    """A submitted run, as a user sees it: FOLDER/micro.yaml, whose run directory is FOLDER/run."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *options: str,
        nodes: int = 2,
        ranks_per_node: int = 1,
        preflight: bool = False,
    ) -> None:
        """Submit it; further options are given to submit.py as they are."""
        self.run_dir = folder / "run"
        self._cluster = cluster
        submit = [sys.executable, REPOSITORY / "launch" / "submit.py", "micro.yaml"]
        size = ["--nodes", str(nodes), "--tasks-per-node", str(ranks_per_node)]
        check = "--preflight" if preflight else "--no-preflight"
        self.told = cluster.run([*submit, *size, check, *options], cwd=folder, **ONE_THREAD).stdout
        found = re.match(r"job +(\d+):", self.told)
        assert found is not None, self.told
        self.job_id = found[1]

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


def write_config(folder: Path, dataset: Path, steps: int, every: int, **sections: dict[str, Any]) -> None:
    """FOLDER/micro.yaml: a run of so many steps, saved every few; what is given of a section is put over it."""
    tree = micro_tree(dataset, folder / "run")
    del tree["data"]["val"]
    tree["schedule"]["length"] = steps
    tree["checkpoint"] = {"every_steps": every}
    tree["watchdog"] = {"step_s": 10, "data_s": 9, "save_s": 30, "beat_s": 0.5, "answer_s": 2}
    for name, changes in sections.items():
        tree[name] = tree.get(name, {}) | changes
    (folder / "micro.yaml").write_text(yaml.safe_dump(tree))


def write_dataset(folder: Path) -> Path:
    """FOLDER/data, built by the command as a user does it: for scripts, which have no `digits_dataset`."""
    (folder / "tars").mkdir()
    write_class_tars(folder / "tars")
    build = ["build", "--source", "class-tars", "tars", "--out", "data", "--val-fraction", "0.2"]
    subprocess.run([sys.executable, "-m", "data_tools", *build], cwd=folder, check=True, capture_output=True)
    return folder / "data"


@contextlib.contextmanager
def undisturbed(folder: Path, *overrides: str, ranks: int = 2) -> Iterator[Path]:
    """The same config by torchrun on this machine, beside what the block does; gives its run directory."""
    torchrun = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", str(ranks), "--standalone"]
    command = [*torchrun, "-m", "vitscale", "train", "micro.yaml", "run.dir=alone", *overrides]
    with (folder / "alone.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **ONE_THREAD}, stdout=log, stderr=log)
    try:
        yield folder / "alone"
        assert process.wait(timeout=300) == 0, (folder / "alone.log").read_text()[-4000:]
    finally:
        process.kill()


def assert_as_if_alone(run_dir: Path, alone: Path, steps: int, rel: float = 0.0) -> None:
    """That each of the steps was done once, with the samples and the loss (up to `rel`) of the undisturbed run."""
    found, expected = losses(run_dir), losses(alone)
    assert list(found) == list(expected) == list(range(1, steps + 1))
    assert found == pytest.approx(expected, rel=rel, abs=0.0)
    seen, expected_seen = read_ledger(run_dir), read_ledger(alone)
    assert {step: sorted(keys) for step, keys in seen.items()} == {s: sorted(keys) for s, keys in expected_seen.items()}
