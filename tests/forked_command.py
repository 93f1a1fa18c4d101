"""`vitscale ...` in a process of its own that need not import torch first.

It is forked from the server of the distributed tests, and is what a shell would start in all that a user sees: the
command's entry point, real streams, and an exit status.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from distributed_runner import forkserver_context
from micro_run import REPOSITORY

from vitscale.cli import main


def vitscale(*words: object, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run the command in the repository until it ends; its exit status and what it wrote."""
    arguments = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = forkserver_context().Process(target=_run, args=(arguments, streams))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["vitscale", *arguments], timeout_s)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in streams))


def _run(arguments: list[str], streams: list[Path]) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["vitscale", *arguments]
    main(arguments)
