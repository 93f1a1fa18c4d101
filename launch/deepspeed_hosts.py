"""Trains on the machines of a hostfile, through the deepspeed launcher, pdsh and ssh.

    python launch/deepspeed_hosts.py HOSTFILE CONFIG.yaml [key=value ...]

It is `deepspeed --hostfile HOSTFILE --module vitscale train CONFIG.yaml ...` and what that lacks: machines that cannot
take part are named before anything starts, settings of the environment reach the ranks, TERM, INT and USR2 end in a
checkpoint, and the exit status is the run's. DeepSpeed gives the ranks of a machine 30 s for that checkpoint.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
from forward_signals import run

from vitscale.errors import EXIT_FILE_VARIABLE, LaunchError

PASSED_ON = ("OMP_", "TORCH_", "GLOO_", "NCCL_", "VITSCALE_")
"""Beginnings of variables that the ranks get too. No secret: the values stand in command lines that all may read."""
SSH_LIMIT_S = 20
PATIENCE_S = 60.0
"""deepspeed leaves as soon as it has passed a signal on; the ranks then save for 30 s at most."""


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--master-addr", metavar="HOST", help="Where rank 0 is met; deepspeed takes the first host's first address."
)
@click.option("--master-port", type=click.IntRange(1, 65535), default=29500, show_default=True, help="Its port.")
@click.argument("hostfile", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
def main(master_addr: str | None, master_port: int, hostfile: Path, arguments: Sequence[str]) -> None:
    """Run `vitscale train ARGUMENTS` on the machines of HOSTFILE, which has a line such as `node1 slots=8` for each.

    \b
    Example:
      python launch/deepspeed_hosts.py hosts.txt configs/in21k/vit_huge_patch14.yaml run.dir=runs/h14
    """
    try:
        check_hosts(read_hosts(hostfile))
    except LaunchError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.status)
    master = [f"--master_port={master_port}", *([f"--master_addr={master_addr}"] if master_addr else [])]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner"]  # that of this Python, wherever PATH leads
    command = [*deepspeed, f"--hostfile={hostfile}", *master, "--module", "vitscale", "train", *arguments]
    # Below the working directory, which all machines see: rank 0 may be on any of them.
    with tempfile.TemporaryDirectory(prefix=".vitscale-exit-", dir=Path.cwd()) as folder:
        exit_file, settings = Path(folder) / "exit.json", Path(folder) / "environment"
        settings.write_text("".join(f"{line}\n" for line in passed_on(os.environ, exit_file)), encoding="utf-8")
        os.environ["DS_ENV_FILE"] = str(settings)
        sys.exit(run(command, exit_file, PATIENCE_S))


def read_hosts(hostfile: Path) -> list[str]:
    """The hosts that a hostfile names.

    Raises:
        LaunchError: there is no such file, or it names none.
    """
    try:
        lines = [line.partition("#")[0].split() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise LaunchError(
            f"{hostfile}: {error.strerror}: give a file with a line `HOST slots=RANKS` a machine"
        ) from None
    hosts = [words[0] for words in lines if len(words) == 2 and words[1].startswith("slots=")]
    if not hosts or len(hosts) < sum(map(bool, lines)):
        raise LaunchError(f"{hostfile}: wants lines `HOST slots=RANKS`, one a machine, and nothing else but # comments")
    return hosts


def check_hosts(hosts: Sequence[str]) -> None:
    """See that every machine lets this user in without a password, and has the same working directory and Python.

    Raises:
        LaunchError: one does not, or this one has no ssh or no pdsh.
    """
    if absent := [name for name in ("ssh", "pdsh") if shutil.which(name) is None]:
        raise LaunchError(f"no {' and no '.join(absent)} on this machine: deepspeed starts the ranks by pdsh over ssh")
    look = f"cd {shlex.quote(str(Path.cwd()))} && test -x {shlex.quote(sys.executable)}"
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_LIMIT_S}"]
    with contextlib.ExitStack() as stack:
        looks = {
            host: stack.enter_context(
                subprocess.Popen([*ssh, host, look], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
            for host in hosts
        }
        faults = {host: fault for host, process in looks.items() if (fault := _fault(process))}
    if faults:
        host, fault = next(iter(faults.items()))
        raise LaunchError(
            f"{host}: {fault} ({len(faults)} of {len(hosts)} hosts): `ssh {host} true` must work without a password, "
            "and all machines must have this directory and this Python"
        )


def _fault(look: subprocess.Popen[str]) -> str:
    _, told = look.communicate()
    if look.returncode == 0:
        return ""
    if look.returncode == 255:  # ssh's own; else the remote command's
        return (told.strip().splitlines() or ["cannot be reached"])[-1]
    return f"has no {sys.executable}, or no {Path.cwd()}"


def passed_on(environ: Mapping[str, str], exit_file: Path) -> Iterator[str]:
    """Lines NAME=VALUE for the ranks: those of the user's own files for deepspeed, and of variables of this process."""
    for folder in ("~", "."):
        with contextlib.suppress(OSError):
            lines = Path(folder, ".deepspeed_env").expanduser().read_text(encoding="utf-8").splitlines()
            yield from (line for line in lines if "=" in line)
    yield from (f"{name}={value}" for name, value in environ.items() if name.startswith(PASSED_ON))
    yield f"{EXIT_FILE_VARIABLE}={exit_file}"


if __name__ == "__main__":
    main()
