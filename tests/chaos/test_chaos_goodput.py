"""The share of time that a run under kills spends on steps that stay: predicted from what its parts take, and seen.

The parts are clocked in that same run, because a shared machine's speed drifts from one run to the next. What is under
test is how they come to the whole: what each kill undoes, what is saved meanwhile, what is waited for.
"""

import random
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import yaml
from chaos_driver import send_to, started_ranks
from micro_run import micro_tree

from vitscale.checkpoint import CheckpointStore, tag_of
from vitscale.planning.goodput import SmallRun, predict

STEPS, EVERY = 600, 30
MEAN_BETWEEN_KILLS_S = 15.0
STEP_LINE = re.compile(r"\bstep (\d+)/")


@dataclass
class Life:
    """One start of the run, on the clock."""

    launched_s: float
    step_seen_s: dict[int, float] = field(default_factory=dict)
    gone_s: float = 0.0


class ClockedRun:
    """One run, whose steps and ends are timed from outside."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        tree = micro_tree(dataset, folder / "run")
        tree["model"] |= {"embed_dim": 128, "depth": 6, "num_heads": 4}
        tree["batch"] = {"global_batch": 64, "micro_batch": 32}
        tree["schedule"] = {"length": STEPS, "warmup": 2}
        tree["checkpoint"] = {"every_steps": EVERY, "keep_last": 3}
        tree["log"] |= {"samples": False, "pictures": 0}
        del tree["data"]["val"]
        folder.mkdir()
        self.folder = folder
        self.config = folder / "clocked.yaml"
        self.config.write_text(yaml.safe_dump(tree))
        self.lives: list[Life] = []

    def live(self, kill_at_s: float) -> None:
        """Run until the end, or until this instant of the clock, at which all ranks are killed."""
        log = self.folder / f"{len(self.lives)}.log"
        life = Life(time.monotonic())
        self.lives.append(life)
        with started_ranks(2, ["train", str(self.config)], log, (0, "", 0)) as processes:
            while any(process.is_alive() for process in processes):
                now_s = time.monotonic()
                for step in STEP_LINE.findall(log.read_text() if log.exists() else ""):
                    life.step_seen_s.setdefault(int(step), now_s)
                if now_s >= kill_at_s:
                    send_to(processes, signal.SIGKILL)
                    break
                time.sleep(0.005)
            for process in processes:
                process.join()
        life.gone_s = time.monotonic()

    @property
    def finished(self) -> bool:
        return (CheckpointStore(self.folder / "run").path(tag_of(STEPS)) / "manifest.json").exists()

    def parts(self, kills_s: Sequence[float]) -> SmallRun:
        """What its parts took, each at its mean; `kills_s` are the clock's instants, one a life but for the last."""
        times_s = [sorted(life.step_seen_s.values()) for life in self.lives]
        step_s = mean(after - before for life in times_s for before, after in pairwise(life))
        begins_s = [seen[0] - life.launched_s - step_s for life, seen in zip(self.lives, times_s, strict=True) if seen]
        detects_s = [life.launched_s - kill_s for life, kill_s in zip(self.lives[1:], kills_s, strict=True)]
        logs = "".join((self.folder / f"{number}.log").read_text() for number in range(len(self.lives)))
        return SmallRun(
            steps=STEPS,
            every_steps=EVERY,
            step_s=step_s,
            stall_s=0.0,  # in the steps
            write_s=mean(float(s) for s in re.findall(r"saved step-\d+ in ([\d.]+) s", logs)),
            start_s=begins_s[0],
            detect_s=mean(detects_s),
            restart_s=mean(begins_s[1:]),
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_predicted_is_seen(tmp_path, digits_dataset):
    dice = random.Random(0)
    tormented = ClockedRun(tmp_path / "tormented", digits_dataset)
    first_s = time.monotonic()
    kills_s, next_s = [], first_s
    while not tormented.finished:
        next_s = max(next_s + dice.expovariate(1 / MEAN_BETWEEN_KILLS_S), time.monotonic() + 0.5)
        kills_s.append(next_s)
        (tormented.folder / "run" / "starts.json").unlink(missing_ok=True)  # the fence is not what is looked at
        tormented.live(kill_at_s=next_s)
        assert time.monotonic() - first_s < 1200
    wall_s = tormented.lives[-1].gone_s - first_s
    kills_s.pop()  # the run was over by then
    run = tormented.parts(kills_s)
    seen = STEPS * run.step_s / wall_s
    predicted = predict(run, [kill_s - first_s for kill_s in kills_s])
    print(f"{run}\n{len(kills_s)} kills, goodput {seen:.3f} seen, {predicted.goodput:.3f} predicted")
    assert len(kills_s) >= 4
    assert seen == pytest.approx(predicted.goodput, rel=0.1)
