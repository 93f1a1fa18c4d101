"""Goodput: the share of a run's wall time that goes into steps that stay, when failures throw it back to its last tag.

A run trains for an interval t, stops for the stall s of a save, and trains on while the save is written; after w the
tag is committed. At most one save is under way: the next waits for it, so a cycle lasts C = s + max(t, w). A failure
takes the run back to the last committed tag, through a restart of length R that a further failure begins anew. With
failures at the rate 1 / M, independent of each other, tag n after a start, which comes at t + s + w + (n - 1) C, is
reached with probability exp(-(t + s + w + (n - 1) C) / M), and M exp(R / M) passes from one start to the next, hence

    goodput = (t / M) exp(-R / M) exp(-(t + s + w) / M) / (1 - exp(-C / M))

which for w = 0 is the complete model of Daly 2006 (Future Generation Computer Systems 22, 303-312). Young 1974
(CACM 17, 530-531) gave the best interval to first order, sqrt(2 s M).
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt

DAY_S = 86_400.0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SaveTimes:
    """What saving costs, and how often it is done."""

    interval_s: float
    """Training between two saves."""
    stall_s: float
    """Steps stand still."""
    write_s: float = 0.0
    """From the end of the stall until the tag is committed; training goes on."""

    @property
    def cycle_s(self) -> float:
        """From one stall's end to the next one's."""
        return self.stall_s + max(self.interval_s, self.write_s)

    @property
    def first_commit_s(self) -> float:
        """From the first step after a start until its first tag is committed."""
        return self.interval_s + self.stall_s + self.write_s

    def tags(self, running_s: npt.ArrayLike) -> Floats:
        """Tags that are committed within a time of running."""
        later: Floats = np.floor((np.asarray(running_s, dtype=np.float64) - self.first_commit_s) / self.cycle_s)
        return np.maximum(later + 1, 0.0)

    def trained_s(self, running_s: npt.ArrayLike) -> Floats:
        """Training within a time of running; the rest of it is stalls."""
        running = np.asarray(running_s, dtype=np.float64)
        later = np.maximum(running - self.interval_s - self.stall_s, 0.0)
        cycles = np.floor(later / self.cycle_s)
        begun = np.minimum(later - cycles * self.cycle_s, self.interval_s)
        return np.minimum(running, self.interval_s) + cycles * self.interval_s + begun


@dataclass(frozen=True)
class RestartTimes:
    """From a failure to the first new step, by part."""

    detect_s: float = 0.0
    """Until the job ends: at once where a process dies, a watchdog's limit where it hangs."""
    requeue_s: float = 0.0
    """Until its processes are started again, nodes for all of them being there."""
    import_s: float = 0.0
    rendezvous_s: float = 0.0
    first_batch_s: float = 0.0
    """The index is opened and the first batch decoded."""
    read_s: float = 0.0
    """The tag is checked and read."""
    compile_s: float = 0.0
    first_step_s: float = 0.0
    """What the first step takes beyond a usual one."""
    node_wait_s: float = 0.0
    """Until a node is replaced, where no spare one is there."""
    node_share: float = 0.0
    """Of failures, those that wait for a node."""

    @property
    def seconds(self) -> float:
        """All parts but the wait for a node."""
        return float(sum(astuple(replace(self, node_wait_s=0.0, node_share=0.0))))

    @property
    def mean_s(self) -> float:
        """All parts."""
        return self.seconds + self.node_share * self.node_wait_s

    def undisturbed(self, mean_between_s: float) -> float:
        """Probability that a restart comes to its end before the next failure."""
        waiting = 1 - self.node_share + self.node_share * math.exp(-self.node_wait_s / mean_between_s)
        return math.exp(-self.seconds / mean_between_s) * waiting


@dataclass(frozen=True)
class FailureRate:
    """How often a job is interrupted."""

    per_gpu_day: float
    gpus: int
    weibull_shape: float = 1.0
    """Of the times between failures: 1 where they are independent of the past (exponential); below 1 they cluster, as
    Schroeder and Gibson 2006 found on HPC systems (0.7 to 0.8)."""

    @property
    def mean_between_s(self) -> float:
        """Mean time between two failures of the job."""
        rate = self.per_gpu_day * self.gpus / DAY_S
        return 1 / rate if rate else math.inf

    def draw(self, runs: int, horizon_s: float, generator: np.random.Generator) -> Floats:
        """Times of failures [runs, n] in each run's order, the last of each beyond the horizon."""
        if math.isinf(self.mean_between_s):
            return np.full((runs, 1), np.inf)
        scale = self.mean_between_s / math.gamma(1 + 1 / self.weibull_shape)
        expected = horizon_s / self.mean_between_s
        block = math.ceil(expected + 4 * math.sqrt(expected)) + 4
        times = np.zeros((runs, 1))
        while times[:, -1].min() < horizon_s:
            gaps = scale * generator.weibull(self.weibull_shape, (runs, block))
            times = np.concatenate([times, times[:, -1:] + np.cumsum(gaps, axis=1)], axis=1)
        return times[:, 1:]


@dataclass(frozen=True)
class Shares:
    """Where the wall time goes; together 1."""

    kept: float
    """Steps that stay: the goodput."""
    stalled: float
    """Saves."""
    lost: float
    """Steps that are done again."""
    down: float
    """Restarts."""


@dataclass(frozen=True)
class Outcome:
    """Where the wall time of each simulated run went, in seconds [runs]; together the horizon."""

    kept_s: Floats
    stalled_s: Floats
    lost_s: Floats
    down_s: Floats

    @property
    def goodput(self) -> Floats:
        """Of each run."""
        return self.kept_s / (self.kept_s + self.stalled_s + self.lost_s + self.down_s)


def young_interval_s(stall_s: float, mean_between_s: float) -> float:
    """The best interval between saves to first order (Young 1974)."""
    return math.sqrt(2 * stall_s * mean_between_s)


def daly_interval_s(stall_s: float, mean_between_s: float) -> float:
    """The best interval between saves to higher order (Daly 2006)."""
    if stall_s >= 2 * mean_between_s:
        return mean_between_s
    ratio = stall_s / (2 * mean_between_s)
    return young_interval_s(stall_s, mean_between_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def best_interval_s(stall_s: float, write_s: float, mean_between_s: float) -> float:
    """Daly's interval, or the time that a save is written for: a shorter one would only wait for it."""
    return max(daly_interval_s(stall_s, mean_between_s), write_s)


def expected_shares(save: SaveTimes, restart: RestartTimes, mean_between_s: float) -> Shares:
    """Where the time of a long run goes, under failures that are independent of each other (see above)."""
    if math.isinf(mean_between_s):
        kept = save.interval_s / save.cycle_s
        return Shares(kept=kept, stalled=1 - kept, lost=0.0, down=0.0)

    def reached(seconds: float) -> float:
        return math.exp(-seconds / mean_between_s)

    up = restart.undisturbed(mean_between_s)
    ended = -math.expm1(-save.cycle_s / mean_between_s)
    kept = up * save.interval_s / mean_between_s * reached(save.first_commit_s) / ended
    resumed = reached(save.interval_s + save.stall_s)
    later = resumed * (reached(save.interval_s) - reached(save.cycle_s)) / ended
    stalled = up * (reached(save.interval_s) - resumed + later)
    return Shares(kept=kept, stalled=stalled, lost=up - stalled - kept, down=1 - up)


def simulate(
    save: SaveTimes,
    restart: RestartTimes,
    failures: FailureRate,
    *,
    horizon_s: float,
    runs: int,
    generator: np.random.Generator,
) -> Outcome:
    """Runs of one length under drawn failures."""
    failures_s = failures.draw(runs, horizon_s, generator)
    waits = generator.random(failures_s.shape) < restart.node_share
    return under_failures(save, restart.seconds + restart.node_wait_s * waits, failures_s, horizon_s)


def under_failures(save: SaveTimes, restart_s: npt.ArrayLike, failures_s: Floats, horizon_s: float) -> Outcome:
    """Runs of one length under given failures. What is done at the horizon counts: the last step is always saved.

    Args:
        save: what saving costs.
        restart_s: of each failure, or of all.
        failures_s: their times [runs, n] in order.
        horizon_s: length of the runs.
    """
    ready, ran, trained, kept = (np.zeros(len(failures_s)) for _ in range(4))
    restarts = np.broadcast_to(np.asarray(restart_s, dtype=np.float64), failures_s.shape)
    for failure, needed in zip(failures_s.T, restarts.T, strict=True):
        happens = failure < horizon_s
        running = np.where(happens, np.maximum(failure - ready, 0.0), 0.0)
        ran += running
        trained += save.trained_s(running)
        kept += save.interval_s * save.tags(running)
        ready = np.where(happens, failure + needed, ready)
    running = np.maximum(horizon_s - ready, 0.0)
    last = save.trained_s(running)
    ran, trained, kept = ran + running, trained + last, kept + last
    return Outcome(kept_s=kept, stalled_s=ran - trained, lost_s=trained - kept, down_s=horizon_s - ran)


@dataclass(frozen=True)
class SmallRun:
    """A run of a fixed number of steps, with what was measured of it without failures."""

    steps: int
    every_steps: int
    """Steps between two saves; the last step is always saved."""
    step_s: float
    stall_s: float
    write_s: float
    start_s: float
    """From the first launch to the first step."""
    detect_s: float
    """From a kill until its processes are gone and the run is launched again."""
    restart_s: float
    """From a launch that goes on from a tag to its first step."""

    @property
    def save(self) -> SaveTimes:
        """What saving costs."""
        return SaveTimes(self.every_steps * self.step_s, self.stall_s, self.write_s)

    def seconds_from(self, step: int) -> float:
        """From the first step after `step`, at a tag or the start, to the commit of the last one."""
        left = self.steps - step
        if left == 0:
            return 0.0
        saves = (left - 1) // self.every_steps
        rest_s = (left - saves * self.every_steps) * self.step_s
        before = 0.0
        if saves:
            # The last save waits for the one before it, as every save does.
            before = self.save.interval_s + self.stall_s + (saves - 1) * self.save.cycle_s
            rest_s = max(rest_s, self.write_s)
        return before + rest_s + self.stall_s + self.write_s


@dataclass(frozen=True)
class Prediction:
    """What a run with kills should come to."""

    wall_s: float
    """From the first launch to the last commit."""
    goodput: float
    """Steps of the run, at their time without failures, over the wall time."""


def predict(run: SmallRun, kills_s: Sequence[float]) -> Prediction:
    """How long a run takes that is killed at known instants and launched again each time.

    Args:
        run: the run and its measured times.
        kills_s: since the first launch, in order; those after the run's end are without effect.
    """
    ready, step = run.start_s, 0
    for kill_s in kills_s:
        if kill_s >= ready + run.seconds_from(step):
            break
        step += run.every_steps * int(run.save.tags(max(kill_s - ready, 0.0)))
        ready = kill_s + run.detect_s + run.restart_s
    wall_s = ready + run.seconds_from(step)
    return Prediction(wall_s=wall_s, goodput=run.steps * run.step_s / wall_s)
