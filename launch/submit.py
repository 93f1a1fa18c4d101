"""Submits a run to Slurm, through submitit.

    python launch/submit.py configs/in21k/vit_huge_patch14.yaml --nodes 8 --tasks-per-node 8 --gpus-per-node 8

Each task of the job is one rank of `vitscale train`. Signals end in a checkpoint and status 75 (the trainer's own
handlers see to that), and the last lines of the batch script decide what happens then. They are in the script,
and not in a rank, because it outlives all ranks: a killed rank 0 is requeued like any other.
"""

import contextlib
import io
import shutil
import signal
import sys
from pathlib import Path

import click
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor

from vitscale.cli import main as vitscale
from vitscale.config import Config, load_config, split_batch
from vitscale.errors import ExitStatus, LaunchError, VitscaleError

NO_OTHER_TRY = (ExitStatus.FINISHED, ExitStatus.USER_ERROR, ExitStatus.DIVERGED)
SRUN_ARGUMENTS = (
    "--open-mode=append",  # a requeued job goes on with the log it has
    "--kill-on-bad-exit=0",  # the first rank that ends with 75 must not cost the others their last writes
    "--wait=600",  # but ranks that hang after another's end are killed
)


def after_srun(max_requeues: int) -> list[str]:
    """Last lines of the batch script: requeue what another try may mend, and end with srun's status.

    That is 128 + the signal where a rank was killed, else the highest of the ranks' statuses.
    """
    no_other_try = "|".join(str(int(status)) for status in NO_OTHER_TRY)
    return [
        "status=$?",
        "case $status in",
        f"  {no_other_try}) ;;",
        f'  *) if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then',
        '       scontrol requeue "$SLURM_JOB_ID" && sleep 600  # Slurm ends the script meanwhile',
        "     fi ;;",
        "esac",
        "exit $status",
    ]


def train_in_task(arguments: list[str]) -> None:
    """What submitit runs in every task: `vitscale train` in this very process, which ends with its status."""
    # submitit's own handlers act on one rank alone. The trainer installs its handlers when it is ready; a signal
    # before that finds nothing to save, and Slurm ends the task in due course.
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    vitscale(["train", *arguments])


class Executor(SlurmExecutor):
    """submitit's Slurm executor, which can show its batch script on a machine without Slurm as well."""

    @classmethod
    def affinity(cls) -> int:
        """Whether Slurm is here is not asked: `submit` has looked for it, and a dry run needs none."""
        return 1

    def script(self) -> str:
        """The batch script that `submit` hands to sbatch."""
        # submitit has no public way to it.
        return self._make_submission_file_text(self._submitit_command_str, uid="")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Machines to use.")
@click.option("--tasks-per-node", type=click.IntRange(min=1), required=True, help="Ranks on each: one for a GPU.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="GPUs of each machine; none on CPUs.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), help="Cores of each rank: loader workers + 1.")
@click.option("--mem-gb", type=click.IntRange(min=1), help="Memory of each machine.")
@click.option("--partition", help="Slurm partition.")
@click.option("--account", help="Slurm account.")
@click.option("--qos", help="Slurm quality of service.")
@click.option("--time", "time_min", type=click.IntRange(min=1), default=1440, show_default=True, help="Minutes.")
@click.option("--name", help="Name of the job; that of the run directory when left out.")
@click.option(
    "--signal-delay",
    "signal_delay_s",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Seconds before the time limit at which the ranks are told to checkpoint.",
)
@click.option("--max-requeues", type=click.IntRange(min=0), default=30, show_default=True, help="Then the job fails.")
@click.option("--dry-run", is_flag=True, help="Print the batch script and submit nothing.")
def submit(
    config_path: Path,
    overrides: tuple[str, ...],
    nodes: int,
    tasks_per_node: int,
    gpus_per_node: int | None,
    cpus_per_task: int | None,
    mem_gb: int | None,
    partition: str | None,
    account: str | None,
    qos: str | None,
    time_min: int,
    name: str | None,
    signal_delay_s: int,
    max_requeues: int,
    dry_run: bool,
) -> None:
    """Train as CONFIG says on a Slurm cluster, requeued until it is finished.

    \b
    Example:
      python launch/submit.py configs/in21k/vit_huge_patch14.yaml --nodes 8 --tasks-per-node 8 \\
          --gpus-per-node 8 --cpus-per-task 12 --partition gpu --time 1440 optim.peak_lr=1e-3
    """
    try:
        run_dir = _check(load_config(config_path, overrides), nodes, tasks_per_node, gpus_per_node)
        executor = Executor(run_dir / "slurm")
        executor.update_parameters(
            job_name=name or run_dir.name,
            nodes=nodes,
            ntasks_per_node=tasks_per_node,
            gpus_per_node=gpus_per_node,
            cpus_per_task=cpus_per_task,
            mem=mem_gb and f"{mem_gb}GB",
            partition=partition,
            account=account,
            qos=qos,
            time=time_min,
            signal_delay_s=signal_delay_s,
            stderr_to_stdout=True,
            srun_args=list(SRUN_ARGUMENTS),
            teardown=after_srun(max_requeues),
            additional_parameters={"requeue": True},
        )
        if dry_run:
            click.echo(executor.script())
            return
        job_id = _submit(executor, [str(config_path), *overrides])
    except VitscaleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.status)
    click.echo(f"job            {job_id}: {nodes} nodes x {tasks_per_node} ranks")
    click.echo(f"run directory  {run_dir}")
    click.echo(f"follow         tail -F {run_dir}/slurm/{job_id}_0_log.out")
    click.echo(f"cancel         scancel {job_id}")
    click.echo(f"monitor        tensorboard --logdir {run_dir}")


def _check(config: Config, nodes: int, tasks_per_node: int, gpus_per_node: int | None) -> Path:
    """What would fail only after the wait in the queue; gives the run directory."""
    split_batch(config.batch, nodes * tasks_per_node)
    if gpus_per_node is not None and gpus_per_node != tasks_per_node:
        raise LaunchError(
            f"--gpus-per-node {gpus_per_node} with --tasks-per-node {tasks_per_node}: a rank uses one GPU, "
            "give both the same number"
        )
    assert config.run.dir is not None  # load_config fills it in
    return config.run.dir


def _submit(executor: Executor, arguments: list[str]) -> str:
    """Hand the job to Slurm; its id.

    Raises:
        LaunchError: there is no Slurm here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError("no sbatch on this machine: submit from a login node, or look at the script with --dry-run")
    executor.folder.mkdir(parents=True, exist_ok=True)
    executor.folder.chmod(0o700)  # submitit's pickles: who can write them can run code as this user
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints there what it raises as well
            return str(executor.submit(train_in_task, arguments).job_id)
    except FailedJobError as error:
        refusal = [line for line in str(error).splitlines() if line.strip()][-1]
        raise LaunchError(f"Slurm takes no job: {refusal}; look at the script with --dry-run") from None


if __name__ == "__main__":
    submit()
