"""`vitscale runs`."""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from vitscale.cli.plan_text import aligned
from vitscale.telemetry.sinks import format_duration
from vitscale.train.run_state import SlurmJob, Summary, find_runs, job_of, summarise

_COLUMNS = ("run", "state", "step", "loss", "val top1", "images/s", "MFU", "restarts", "left")
_SQUEUE = (
    "squeue", "--me", "--array", "--noheader", "--states=PENDING,CONFIGURING,RUNNING,COMPLETING", "--format=%i|%T|%r",
)  # fmt: skip
_SQUEUE_LIMIT_S = 10.0


@click.command(name="runs", short_help="The state of many runs.")
@click.argument("dirs", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For machines: a list with an object a run.")
def command(dirs: tuple[Path, ...], as_json: bool) -> None:
    """Show the state of runs in one table: a row a run, and a line for each one that needs a look.

    DIR: a run directory, or a folder that holds some, such as runs/ or that of a sweep. Nothing in it is touched, and
    it does not matter where the runs are. Loss is the mean over about 100 steps, as in train/loss_ema; left is what is
    left of the training at the rate of the newest record.

    \b
    Examples:
      vitscale runs runs/
      vitscale runs runs/peak-lr-* --json
    """
    found = list(dict.fromkeys(run for folder in dirs for run in find_runs(folder)))
    ids = {run: job for run in found if (job := job_of(run)) is not None}
    jobs = _jobs() if ids else {}
    summaries = [summarise(run, jobs.get(ids.get(run, "")), time.time()) for run in found]
    click.echo(json.dumps([asdict(s) for s in summaries], indent=1) if as_json else "\n".join(_table(summaries)))


def _table(summaries: Sequence[Summary]) -> list[str]:
    lines = aligned([_COLUMNS, *map(_row, summaries)], left=(0, 1))
    return [*lines, *(f"{s.run}: {s.state}: {s.reason}" for s in summaries if s.reason)]


def _row(summary: Summary) -> tuple[str, ...]:
    total = f"/{summary.total_steps}" if summary.total_steps is not None else ""
    return (
        summary.run,
        summary.state,
        "-" if summary.step is None else f"{summary.step}{total}",
        _number(summary.loss_ema, "{:.4f}"),
        _number(summary.val_top1, "{:.1%}"),
        _number(summary.images_per_s, "{:.0f}"),
        _number(summary.mfu, "{:.1%}"),
        str(summary.restarts),
        "-" if summary.left_s is None else format_duration(summary.left_s),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _jobs() -> Mapping[str, SlurmJob]:
    """This user's jobs that wait or are on, by id; none where there is no Slurm, or, with a line, no answer."""
    try:
        done = subprocess.run(_SQUEUE, capture_output=True, text=True, timeout=_SQUEUE_LIMIT_S, check=True)
    except FileNotFoundError:
        return {}
    except (OSError, subprocess.SubprocessError):
        click.echo("squeue gives no answer: runs that are queued or starting cannot be told from others", err=True)
        return {}
    rows = (line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2)
    return {job: SlurmJob(state, reason) for job, state, reason in rows}
