"""Submits a run to Slurm, through submitit.

    python launch/submit.py configs/in21k/vit_huge_patch14.yaml --nodes 8 --gpus-per-node 8

Each task of the job is one rank of `vitscale train`. Signals end in a checkpoint and status 75 (the trainer's own
handlers see to that), and the last lines of the batch script decide what happens then: see batch_script.py.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from cluster_state import await_end, check_cluster, check_no_other_job
from job_options import given, job_options
from job_request import JobRequest, draw_request
from planned_memory import check_memory, plan_lines, plan_of
from submission import draw_executor, draw_job, hand_in
from sweep import Point, draw_points

from vitscale.cli.main import main as vitscale
from vitscale.config import check_recorded, phase_batches, split_batch
from vitscale.errors import LaunchError, VitscaleError

WRAPPER = Path(__file__).with_name("forward_signals.py")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cluster", metavar="NAME", help="Defaults for the options below: configs/cluster/NAME.yaml.")
@job_options
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="KEY=V,V",
    help="A job for each value, or for each item of a YAML file's list; several sweeps are multiplied.",
)
@click.option("--allow-change", multiple=True, metavar="KEY", help="As for vitscale train.")
@click.option("--local", is_flag=True, help="Run the ranks of one node here, without Slurm.")
@click.option("--debug", is_flag=True, help="Run one rank here, in this very process.")
@click.option("--dry-run", is_flag=True, help="Print batch script, config and plan, and submit nothing.")
@click.option("--wait", is_flag=True, help="Wait for the job and end with its status.")
@click.option("--follow", is_flag=True, help="The same, and print rank 0's log meanwhile.")
@click.option("--force", is_flag=True, help="Submit although the plan needs more memory than a GPU has.")
def submit(
    config_path: Path,
    overrides: tuple[str, ...],
    cluster: str | None,
    sweeps: tuple[str, ...],
    allow_change: tuple[str, ...],
    local: bool,
    debug: bool,
    dry_run: bool,
    wait: bool,
    follow: bool,
    force: bool,
    **options: Any,
) -> None:
    """Train as CONFIG says on a Slurm cluster, requeued until it is finished.

    \b
    Examples:
      python launch/submit.py configs/in21k/vit_huge_patch14.yaml --nodes 8 --gpus-per-node 8 \\
          --cpus-per-task 12 --partition gpu --time 1-00:00:00 optim.peak_lr=1e-3
      python launch/submit.py configs/in21k/vit_huge_patch14.yaml --cluster h100-8 --nodes 8 \\
          --sweep optim.peak_lr=3e-4,1e-3 --dry-run
    """
    try:
        request = draw_request(given(options), cluster)
        points = draw_points(config_path, overrides, sweeps)
        check_runs(request, points, allow_change)
        train_options = [f"--allow-change={key}" for key in allow_change]
        if local or debug:
            check_here(request, points, local and debug)
            train_here([str(config_path), *overrides, *train_options], request, alone=debug)
        run_dir = points[0].run_dir.parent if sweeps else points[0].run_dir
        if dry_run:
            click.echo(dry_run_text(request, points, run_dir))
            if not force:
                check_memory(plan_of(points[0].config, request, request.fewest_nodes))
            return
        ids = submit_job(request, points, run_dir, train_options, force)
        click.echo(told_text(request, points, run_dir, ids))
        if wait or follow:
            sys.exit(await_end(ids, follower(run_dir, ids[0]) if follow else lambda: None))
    except VitscaleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.status)


def check_runs(request: JobRequest, points: Sequence[Point], allow_change: Sequence[str]) -> None:
    """What would fail only after the wait in the queue.

    Raises:
        ConfigError: a batch does not fall on the ranks.
        RunDirectoryError: a run directory is that of another config.
    """
    for point in points:
        for batch in phase_batches(point.config.schedule, point.config.batch):
            for nodes in (request.nodes, request.fewest_nodes):
                split_batch(batch, nodes * request.ranks_per_node)
        check_recorded(point.run_dir / "config.yaml", point.config, allow_change)


def submit_job(
    request: JobRequest, points: Sequence[Point], run_dir: Path, train_options: Sequence[str], force: bool
) -> list[str]:
    """Look once more, and hand the job in; its id, or those of the elements of its array.

    Raises:
        LaunchError: Slurm or the planner says that it cannot run, or an earlier job of a run directory is not over.
    """
    if absent := [command for command in ("sbatch", "srun") if shutil.which(command) is None]:
        raise LaunchError(
            f"no {' and '.join(absent)} on this machine: submit from a login node, or look at the script with --dry-run"
        )
    check_cluster(request)
    for point in points:
        check_no_other_job(point.run_dir)
    if request.hbm_gb is not None and not force:
        for point in points:  # on fewer nodes each rank holds more
            check_memory(plan_of(point.config, request, request.fewest_nodes))
    return hand_in(draw_job(request, points, run_dir), points, run_dir.name, train_options)


def dry_run_text(request: JobRequest, points: Sequence[Point], run_dir: Path) -> str:
    """The batch script, then each point's run directory, then config and plan (of a sweep its first point's)."""
    script = draw_executor(draw_job(request, points, run_dir), run_dir.name).script(len(points))
    runs = [f"{index}: {point.run_dir}" for index, point in enumerate(points)] if len(points) > 1 else []
    plan = plan_lines(plan_of(points[0].config, request, request.nodes))
    return "\n\n".join(filter(None, [script, "\n".join(runs), plan]))


def told_text(request: JobRequest, points: Sequence[Point], run_dir: Path, ids: Sequence[str]) -> str:
    """What was submitted, and what to do next."""
    job_id = ids[0].partition("_")[0]
    spare = f" (and {request.spare_nodes} to spare)" if request.spare_nodes else ""
    size = f"{request.nodes} nodes{spare} x {request.ranks_per_node} ranks"
    lines = [f"job            {job_id}: {size}", f"run directory  {run_dir}"]
    if len(points) > 1:
        lines = [f"job            {job_id}: {len(points)} runs of {size}"]
        lines += [f"run directory  {point.run_dir}" for point in points]
        lines += [f"table          vitscale runs {shlex.quote(str(run_dir))}"]
    return "\n".join(
        [
            *lines,
            f"follow         tail -F {shlex.quote(str(_log(run_dir, ids[0])))}",
            f"cancel         scancel {job_id}",
            f"monitor        tensorboard --logdir {shlex.quote(str(run_dir))}",
        ]
    )


def follower(run_dir: Path, job_id: str) -> Callable[[], None]:
    """A function that prints what has come to rank 0's log since it was last called."""
    log, told_bytes = _log(run_dir, job_id), 0

    def print_new() -> None:
        nonlocal told_bytes
        if not log.exists():
            return
        with log.open("rb") as file:
            file.seek(told_bytes)
            new = file.read()
        told_bytes += len(new)
        click.echo(new, nl=False)

    return print_new


def check_here(request: JobRequest, points: Sequence[Point], both: bool) -> None:
    """What --local and --debug cannot do.

    Raises:
        LaunchError: it is asked for.
    """
    if both:
        raise LaunchError("--local with --debug: --debug is one rank in this process, leave one of them out")
    if len(points) > 1:
        raise LaunchError("--sweep with --local or --debug: a sweep is a Slurm array, give its values one by one")
    if request.nodes > 1:
        raise LaunchError(f"--nodes {request.nodes} with --local or --debug: this is one machine, leave --nodes out")


def train_here(arguments: list[str], request: JobRequest, alone: bool) -> NoReturn:
    """Train on this machine, in this process or by torchrun, and end with the run's status."""
    if alone:
        vitscale(["train", *arguments])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(request.ranks_per_node),
    ]
    command = [sys.executable, str(WRAPPER), *torchrun, "-m", "vitscale", "train", *arguments]
    os.execv(sys.executable, command)


def _log(run_dir: Path, job_id: str) -> Path:
    return run_dir / "slurm" / f"{job_id}_0_log.out"


if __name__ == "__main__":
    submit()
