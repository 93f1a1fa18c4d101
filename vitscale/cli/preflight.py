"""`vitscale preflight`."""

import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from vitscale.cli.preflight_text import choice_lines
from vitscale.config import Config, load_config, phase_batches, split_batch, usable_ranks
from vitscale.errors import ExitStatus, LaunchError
from vitscale.ranks.hosts import expand_hosts
from vitscale.train.preflight.choice import Choice, Verdict, choose, judge
from vitscale.train.preflight.reports import read_reports, write_whole
from vitscale.train.preflight.rules import Evidence


@click.command(name="preflight", short_help="Check nodes before a run.")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR", help="As a task of a job: write there.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With --report: for ranks that do not come; 90 if not given.",
)
@click.option(
    "--choose", "chosen", type=click.Path(path_type=Path), metavar="DIR", help="Choose nodes by what is there."
)
@click.option("--nodes", type=click.IntRange(min=1), help="With --choose: nodes of the run.")
@click.option("--min-nodes", type=click.IntRange(min=1), help="With --choose: nodes that it can do with.")
@click.option("--tasks-per-node", type=click.IntRange(min=1), help="With --choose: ranks of each.")
def command(
    config: Path,
    overrides: tuple[str, ...],
    report: Path | None,
    wait_s: float | None,
    chosen: Path | None,
    nodes: int | None,
    min_nodes: int | None,
    tasks_per_node: int | None,
) -> ExitStatus:
    """Check whether machines can run CONFIG: its plan, data, disks, versions, devices, and the network between them.

    Alone it checks this machine. In a Slurm job it runs as tasks first, which leave reports in a folder that all
    nodes share, and then chooses: DIR/hosts gets a line for each rank of the run, DIR/report.json everything. Slow
    and broken nodes are named and left out, as far as the job has spare ones.

    \b
    Examples:
      vitscale preflight configs/in21k/vit_huge_patch14.yaml
      srun --kill-on-bad-exit=0 --wait=0 --ntasks-per-node=8 vitscale preflight CONFIG.yaml --report DIR
      vitscale preflight CONFIG.yaml --choose DIR --nodes 8 --tasks-per-node 8

    \b
    Exit status: 0 the run can start, 2 an error to mend, 1 another try may find better nodes.
    """
    if report is not None and chosen is not None:
        raise click.UsageError("--report and --choose are two steps of a job: give one of them")
    if report is None and wait_s is not None:
        raise click.UsageError("--wait is read by the tasks alone: give it with --report")
    if chosen is None and (nodes, min_nodes, tasks_per_node) != (None, None, None):
        raise click.UsageError("--nodes, --min-nodes and --tasks-per-node are of the choice: give them with --choose")
    if chosen is not None:
        if nodes is None or tasks_per_node is None:
            raise click.UsageError("--choose needs --nodes and --tasks-per-node")
        return _choose(load_config(config, overrides), chosen, nodes, min_nodes or nodes, tasks_per_node)
    # The choice must not wait for torch.
    task = importlib.import_module("vitscale.cli.preflight_task")
    loaded = load_config(config, overrides)
    status: ExitStatus = task.look_around(loaded) if report is None else task.attend_as_task(loaded, report, wait_s)
    return status


def _choose(config: Config, folder: Path, nodes: int, least: int, tasks_per_node: int) -> ExitStatus:
    """Judge what is in the folder, write and print the choice; its report takes the place of those that were there.

    Raises:
        ConfigError: the batch does not split on that many ranks.
        LaunchError: the run cannot start; its status says whether another try may help.
    """
    if not (nodelist := os.environ.get("SLURM_JOB_NODELIST")):
        raise LaunchError("--choose: SLURM_JOB_NODELIST is not set: run it in the batch script of a job")
    if least > nodes:
        raise LaunchError(f"--min-nodes {least} is more than --nodes {nodes}: give at most that many")

    def usable(available: int) -> int:
        return usable_ranks(config.schedule, config.batch, available * tasks_per_node, tasks_per_node) // tasks_per_node

    if usable(nodes) < least:
        for batch in phase_batches(config.schedule, config.batch):
            split_batch(batch, nodes * tasks_per_node)
    hosts = expand_hosts(nodelist)
    evidence = Evidence(hosts, *read_reports(folder, hosts), tasks_per_node)
    verdicts, choice = judge(evidence), choose(evidence, nodes, least, usable)
    click.echo("\n".join(choice_lines(evidence, verdicts, choice)))
    _write(folder, evidence, verdicts, choice)
    if not choice.used:
        error = LaunchError(f"preflight: {choice.reason}")
        error.status = choice.status
        raise error
    click.echo(f"{len(choice.used)} nodes x {tasks_per_node} ranks: {' '.join(choice.used)}")
    return choice.status


def _write(folder: Path, evidence: Evidence, verdicts: Sequence[Verdict], choice: Choice) -> None:
    ranks = sorted(evidence.ranks, key=lambda rank: rank.rank)
    everything = {
        "choice": asdict(choice),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "nodes": [asdict(report) for report in evidence.reports.values()],
        "ranks": [asdict(rank) for rank in ranks],
    }
    lines = [f"{node}\n" for node in choice.used for _ in range(evidence.tasks_per_node)]
    try:
        write_whole(folder / "report.json", json.dumps(everything, indent=1) + "\n")
        write_whole(folder / "hosts", "".join(lines))
        # At each start of a job of thousands of ranks: all of it is in report.json.
        for file in (*folder.glob("rank-*.json"), *(folder / f"{node}.json" for node in evidence.nodes)):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(f"{folder}: cannot be written: {error.strerror}: give a folder with room") from None
