"""The goodput of a planned run under failures: `vitscale plan --goodput`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vitscale.cli.plan_text import aligned
from vitscale.planning import (
    BEST,
    ORIGINS,
    WORST,
    ClusterCosts,
    RestartTimes,
    SaveTimes,
    Shares,
    best_interval_s,
    daly_interval_s,
    expected_shares,
    simulate,
    young_interval_s,
)
from vitscale.planning.goodput import DAY_S
from vitscale.telemetry import peak_flops

ASSUMED_GPU, ASSUMED_MFU = "H100", 0.45
SIZES = (64, 256, 1024, 4096, 16_384)
AIM = 0.99
DRAWN_RUNS, DRAWN_DAYS, CLUSTERED = 1000, 30, 0.7
_GROUP_LIMIT_S = 600.0  # a collective fails by itself then
_WAIT_S = 600


@dataclass(frozen=True)
class _Job:
    """One case of a run: what saving and restarting cost it at a number of GPUs."""

    costs: ClusterCosts
    state_bytes: int
    gpus: int

    @property
    def mean_between_s(self) -> float:
        return self.costs.failures(self.gpus).mean_between_s

    @property
    def stall_s(self) -> float:
        return self.costs.stall_s(self.state_bytes, self.gpus)

    @property
    def write_s(self) -> float:
        return self.costs.write_s(self.state_bytes, self.gpus)

    @property
    def restart(self) -> RestartTimes:
        return self.costs.restart(self.state_bytes, self.gpus)

    @property
    def interval_s(self) -> float:
        return best_interval_s(self.stall_s, self.write_s, self.mean_between_s)

    def save(self, interval_s: float) -> SaveTimes:
        return self.costs.save(self.state_bytes, self.gpus, interval_s)

    def shares(self, interval_s: float) -> Shares:
        return expected_shares(self.save(interval_s), self.restart, self.mean_between_s)


def goodput_plan(plan: Mapping[str, Any], step_s: float | None) -> dict[str, Any]:
    """What `--goodput` adds to a plan, as plain values.

    Args:
        plan: of `vitscale.cli.plan.draw_plan`.
        step_s: seconds a step; where left out, those of an assumed MFU.
    """
    gpus, configured = plan["gpus"], plan["config"]["checkpoint"]["every_steps"]
    cases = {"best": BEST, "worst": replace(WORST, detect_s=_hang_s(plan["config"]["watchdog"]))}
    seconds = step_s or _assumed_step_s(plan)
    jobs = {name: _Job(costs, plan["checkpoint_bytes"], gpus) for name, costs in cases.items()}
    # The worst case decides: its goodput is the lower one at any interval.
    every_steps = max(1, round(jobs["worst"].interval_s / seconds))
    return {
        "step_s": seconds,
        "step_from": "--step-s" if step_s else f"{100 * ASSUMED_MFU:.0f} % MFU on {ASSUMED_GPU}, assumed",
        "assumptions": [
            {"field": field, **{name: asdict(costs)[field] for name, costs in cases.items()}, **origin._asdict()}
            for field, origin in ORIGINS.items()
        ],
        "sizes": [
            {"gpus": size} | {name: _optimum(replace(job, gpus=size)) for name, job in jobs.items()}
            for size in sorted({*SIZES, gpus})
        ],
        "every_steps": every_steps,
        "at": {
            str(steps): {name: _at(job, steps * seconds) for name, job in jobs.items()}
            for steps in dict.fromkeys((every_steps, configured))
        },
        "alone": _alone(jobs["worst"]),
        "drawn": {name: _drawn(job, every_steps * seconds) for name, job in jobs.items()},
    }


def _assumed_step_s(plan: Mapping[str, Any]) -> float:
    phase, peak = plan["phases"][-1], peak_flops(ASSUMED_GPU)
    assert peak is not None
    return float(phase["global_batch"] * phase["train_flops"] / (plan["gpus"] * peak * ASSUMED_MFU))


def _hang_s(watchdog: Mapping[str, float | None]) -> float:
    """How long a run may hang in a step before it ends."""
    limit_s, answer_s = watchdog["step_s"], watchdog["answer_s"]
    return _GROUP_LIMIT_S if limit_s is None or answer_s is None else min(limit_s + answer_s, _GROUP_LIMIT_S)


def _optimum(job: _Job) -> dict[str, float]:
    return {
        "failure_every_s": job.mean_between_s,
        "stall_s": job.stall_s,
        "write_s": job.write_s,
        "restart_s": job.restart.mean_s,
        "young_s": young_interval_s(job.stall_s, job.mean_between_s),
        "daly_s": daly_interval_s(job.stall_s, job.mean_between_s),
        "interval_s": job.interval_s,
        "goodput": job.shares(job.interval_s).kept,
    }


def _at(job: _Job, interval_s: float) -> dict[str, Any]:
    """Goodput at an interval, and what the rest of the time goes to."""
    shares, restart = job.shares(interval_s), job.restart
    parts = {name: seconds for name, seconds in asdict(restart).items() if name != "node_share"}
    down = {name.removesuffix("_s"): shares.down * seconds / restart.mean_s for name, seconds in parts.items()}
    return {
        "goodput": shares.kept,
        "losses": {"stalls of saves": shares.stalled, "steps done again": shares.lost} | down,
        "a_wait_costs": shares.kept * _WAIT_S / job.mean_between_s,
    }


def _alone(job: _Job) -> list[dict[str, Any]]:
    """Goodput of the worst case if one assumption were the best one's: what decides comes first."""
    found = []
    for field, origin in ORIGINS.items():
        better = replace(job, costs=replace(job.costs, **{field: asdict(BEST)[field]}))
        found.append({"field": field, "what": origin.what, "goodput": better.shares(better.interval_s).kept})
    return sorted(found, key=lambda row: -row["goodput"])


def _drawn(job: _Job, interval_s: float) -> dict[str, list[float]]:
    """Mean and 5 % quantile of the goodput of drawn runs, failures being independent, and clustered."""
    found = {}
    for name, shape in (("independent", 1.0), ("clustered", CLUSTERED)):
        outcome = simulate(
            job.save(interval_s),
            job.restart,
            replace(job.costs.failures(job.gpus), weibull_shape=shape),
            horizon_s=DRAWN_DAYS * DAY_S,
            runs=DRAWN_RUNS,
            generator=np.random.default_rng(0),
        )
        found[name] = [float(outcome.goodput.mean()), float(np.quantile(outcome.goodput, 0.05))]
    return found


def goodput_text(plan: Mapping[str, Any]) -> str:
    """The section for a person."""
    goodput = plan["goodput"]
    lines = ["goodput: share of the wall time that goes into steps that stay, under failures (docs/goodput.md)"]
    rows = [["  assumption", "best", "worst", "unit", "basis", "from"]]
    for row in goodput["assumptions"]:
        rows.append([f"  {row['what']}", _number(row["best"]), _number(row["worst"])])
        rows[-1] += [row["unit"], row["basis"], row["source"]]
    lines += aligned(rows, left=(0, 3, 4, 5))
    lines += ["", f"a tag {plan['checkpoint_bytes'] / 1e9:.2f} GB, a step {_number(goodput['step_s'])} s"]
    lines[-1] += f" ({goodput['step_from']}); best to worst:"
    head = ["  GPUs", "failure every, h", "stall, s", "write, s", "restart, s", "Young, s", "Daly, s", "interval, s"]
    rows = [[*head, "goodput"]]
    for row in goodput["sizes"]:
        best, worst = row["best"], row["worst"]
        cells = [
            f"{'>' if row['gpus'] == plan['gpus'] else ' '} {row['gpus']}",
            _number(best["failure_every_s"] / 3600),
        ]
        keys = ("stall_s", "write_s", "restart_s", "young_s", "daly_s", "interval_s")
        cells += [f"{_number(best[key])} to {_number(worst[key])}" for key in keys]
        rows.append([*cells, f"{_percent(best['goodput'])} to {_percent(worst['goodput'])}"])
    lines += aligned(rows)
    return "\n".join([*lines, "", *_verdict(plan)])


def _verdict(plan: Mapping[str, Any]) -> list[str]:
    goodput = plan["goodput"]
    recommended, configured = goodput["every_steps"], plan["config"]["checkpoint"]["every_steps"]
    whose = {str(configured): "the config's", str(recommended): "recommended"}
    lines = []
    for steps, at in goodput["at"].items():
        kept = f"{_percent(at['best']['goodput'])} to {_percent(at['worst']['goodput'])}"
        seconds = int(steps) * goodput["step_s"]
        lines.append(
            f"on {plan['gpus']} GPUs with checkpoint.every_steps={steps} ({whose[steps]}, {seconds:.0f} s): {kept}"
        )
    cases = goodput["at"][str(recommended)]
    for name, case in cases.items():
        largest = sorted(case["losses"].items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{what.replace('_', ' ')} {_percent(share)}" for what, share in largest)
        (mean, low), (clustered, _) = goodput["drawn"][name].values()
        lines.append(f"  {name}: {_aim(case)}; most goes to {said}")
        lines.append(
            f"    {DRAWN_RUNS} drawn runs of {DRAWN_DAYS} days: {_percent(mean)}, one in twenty below {_percent(low)}; "
            f"failures in clusters (Weibull, {CLUSTERED}): {_percent(clustered)}"
        )
    alone = ", ".join(f"{row['what']} {_percent(row['goodput'])}" for row in goodput["alone"][:3])
    lines.append(f"  worst, but for one assumption: {alone}")
    lines.append(
        f"Each {_WAIT_S} s more from a failure to the next step (no spare node, a person to be asked) cost "
        f"{_percent(cases['best']['a_wait_costs'])}."
    )
    return lines


def _aim(case: Mapping[str, Any]) -> str:
    if case["goodput"] >= AIM:
        return f"{100 * AIM:.0f} % is reached"
    too_long_s = _WAIT_S * (AIM - case["goodput"]) / case["a_wait_costs"]
    return f"{100 * AIM:.0f} % is NOT reached, for want of {too_long_s:.0f} s a failure"


def _number(value: float) -> str:
    """Three digits, in full where there are more."""
    if 0 < abs(value) < 1e-2:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
