"""Entry point: the table of commands, and how errors become one line and an exit status.

A command's module is imported when that command runs, so that `vitscale --help` need not wait for torch.
"""

import importlib
import keyword
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from vitscale.errors import ExitStatus, VitscaleError

COMMANDS = {
    "train": "Pretrain or fine-tune; resumes by itself from its run directory.",
    "checkpoint": "Show, check and remove what a run has saved.",
    "runs": "Show the state of many runs.",
    "export": "Turn a training checkpoint into a portable model.",
    "import": "Turn weights of others into ours.",
    "convert": "Turn one portable model into another.",
    "plan": "Show what a config comes to, without a GPU.",
    "preflight": "Check machines before a run.",
    "models": "List the model variants.",
    "bench": "Run a benchmark and print its table.",
}


class _LazyGroup(click.Group):
    """Commands by name, each in the module vitscale.cli.<name> as the function `command` (`import_` for `import`)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = importlib.import_module(f"vitscale.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vitscale")
@click.option("--local_rank", type=int, hidden=True, help="What the deepspeed launcher puts first; not used.")
def _vitscale(local_rank: int | None) -> None:
    """Pretrain huge Vision Transformers on ImageNet-21k.

    \b
    Example:
      vitscale train configs/in21k/vit_huge_patch14.yaml batch.global_batch=4096
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status: Any = _vitscale.main(arguments, prog_name="vitscale", standalone_mode=False)
    except VitscaleError as error:
        if not error.told:
            rank = os.environ.get("RANK", "0")
            click.echo(f"error: {'' if rank == '0' else f'rank {rank}: '}{error}", err=True)
        return error.status
    except click.ClickException as error:
        error.show()
        return ExitStatus.USER_ERROR
    except click.Abort:
        return ExitStatus.TRANSIENT
    return int(status or ExitStatus.FINISHED)
