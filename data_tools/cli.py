"""The command `vitscale-data`."""

import sys

import click

from data_tools.build_cli import bench_command, build_command, merge_command, plan_command
from data_tools.check_cli import index_command, verify_command
from data_tools.look_cli import inspect_command, stats_command
from vitscale.errors import VitscaleError


def main() -> None:
    """Run the command; an error its user can mend is one line on stderr and the error's exit status."""
    try:
        cli(prog_name="vitscale-data")
    except VitscaleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.status)


@click.group()
def cli() -> None:
    """Build and check shards."""


for command in (
    plan_command,
    build_command,
    merge_command,
    index_command,
    verify_command,
    stats_command,
    inspect_command,
    bench_command,
):
    cli.add_command(command)
