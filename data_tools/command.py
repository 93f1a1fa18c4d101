"""What the commands of `vitscale-data` share: two options, and how a report is printed."""

import json
import os
from typing import Any, Protocol

import click

CORES = len(os.sched_getaffinity(0))

workers_option = click.option(
    "--workers", default=CORES, show_default="cores", type=click.IntRange(min=1), help="Processes."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")


class Report(Protocol):
    """What a command found or did."""

    def lines(self) -> list[str]:
        """For people."""

    def tree(self) -> dict[str, Any]:
        """For machines."""


def tell(report: Report, as_json: bool) -> None:
    """Print a report on stdout."""
    click.echo(json.dumps(report.tree()) if as_json else "\n".join(report.lines()))
