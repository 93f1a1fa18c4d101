"""The share of time that a run spends on steps that stay: predicted from what its parts take, and seen under kills."""

import random
import re
import signal
import statistics
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from chaos_driver import send_to, started_ranks
from micro_run import micro_tree

from vitscale.checkpoint import CheckpointStore, tag_of
from vitscale.planning.goodput import SmallRun, predict

STEPS, EVERY = 600, 30
MEAN_BETWEEN_KILLS_S = 15.0
STEP_LINE = re.compile(r"^step (\d+)/", re.MULTILINE)


class Clocked:
    """One run, whose steps and ends are timed from outside."""

    def __init__(self, folder: Path, dataset: Path, *, steps: int = STEPS) -> None:
        tree = micro_tree(dataset, folder / "run")
        tree["model"] |= {"embed_dim": 128, "depth": 6, "num_heads": 4}
        tree["batch"] = {"global_batch": 64, "micro_batch": 32}
        tree["schedule"] = {"length": steps, "warmup": 2}
        tree["checkpoint"] = {"every_steps": EVERY, "keep_last": 3}
        tree["log"] |= {"samples": False, "pictures": 0}
        del tree["data"]["val"]
        folder.mkdir()
        self.folder, self.steps = folder, steps
        self.config = folder / "clocked.yaml"
        self.config.write_text(yaml.safe_dump(tree))
        self.lives = 0
        self.step_times_s: list[dict[int, float]] = []

    def live(self, kill_at_s: float | None = None, kill_at_step: int | None = None) -> float:
        """Run until the end or a kill, at an instant or after a step; gives when all ranks were gone."""
        log = self.folder / f"{self.lives}.log"
        self.lives += 1
        seen: dict[int, float] = {}
        self.step_times_s.append(seen)
        with started_ranks(2, ["train", str(self.config)], log, (0, "", 0)) as processes:
            while any(process.is_alive() for process in processes):
                now_s = time.monotonic()
                for step in STEP_LINE.findall(log.read_text() if log.exists() else ""):
                    seen.setdefault(int(step), now_s)
                late = kill_at_s is not None and now_s >= kill_at_s
                if late or (kill_at_step is not None and max(seen, default=0) >= kill_at_step):
                    send_to(processes, signal.SIGKILL)
                    break
                time.sleep(0.005)
            for process in processes:
                process.join()
        return time.monotonic()

    @property
    def finished(self) -> bool:
        return (CheckpointStore(self.folder / "run").path(tag_of(self.steps)) / "manifest.json").exists()


def measured(folder: Path, dataset: Path) -> SmallRun:
    """What the parts of a run take: one that nobody disturbs, and three kills with their restarts."""
    calm = Clocked(folder / "calm", dataset, steps=4 * EVERY)
    began_s = time.monotonic()
    calm.live()
    times_s = list(calm.step_times_s[0].values())
    step_s = statistics.median(after - before for before, after in pairwise(times_s))
    written_s = [float(s) for s in re.findall(r"saved step-\d+ in ([\d.]+) s", (calm.folder / "0.log").read_text())]
    restarts_s, detects_s = [], []
    killed = Clocked(folder / "killed", dataset)
    for life in range(4):
        launched_s = time.monotonic()
        gone_s = killed.live(kill_at_step=(life + 1) * (EVERY + 15))
        times_of_life_s = sorted(killed.step_times_s[-1].values())
        if life:
            restarts_s.append(times_of_life_s[0] - launched_s - step_s)
        detects_s.append(gone_s - times_of_life_s[-1])
    return SmallRun(
        steps=STEPS,
        every_steps=EVERY,
        step_s=step_s,
        stall_s=0.0,
        write_s=statistics.median(written_s),
        start_s=times_s[0] - began_s - step_s,
        detect_s=statistics.median(detects_s),
        restart_s=statistics.median(restarts_s),
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_predicted_is_seen(tmp_path, digits_dataset):
    run = measured(tmp_path, digits_dataset)
    dice = random.Random(0)
    tormented = Clocked(tmp_path / "tormented", digits_dataset)
    first_s = time.monotonic()
    kills_s, next_s = [], first_s
    while not tormented.finished:
        next_s = max(next_s + dice.expovariate(1 / MEAN_BETWEEN_KILLS_S), time.monotonic() + 0.5)
        (tormented.folder / "run" / "starts.json").unlink(missing_ok=True)  # the fence is not what is looked at
        tormented.live(kill_at_s=next_s)
        kills_s.append(next_s - first_s)
        assert time.monotonic() - first_s < 1200
    wall_s = time.monotonic() - first_s
    kills_s = [kill_s for kill_s in kills_s if kill_s < wall_s]
    seen, predicted = STEPS * run.step_s / wall_s, predict(run, kills_s)
    print(f"{run}\n{len(kills_s)} kills, goodput {seen:.3f} seen, {predicted.goodput:.3f} predicted")
    assert len(kills_s) >= 4
    assert seen == pytest.approx(predicted.goodput, rel=0.1)
