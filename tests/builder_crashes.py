"""Kills a build before each of its effects on the disk in turn, and runs it again; a script, because it forks.

    python builder_crashes.py FOLDER EXPECTED

EXPECTED is an undisturbed build, whose settings are taken and whose bytes every other one must leave.
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path

from builder_command import content

from data_tools.build import BuildRun, build
from data_tools.plan_file import PlanSettings, read_plan

RUN = BuildRun(on_bad="fail", workers=1, recheck=False, keep_spool=False)
KILLED = -signal.SIGKILL


def main(folder: Path, expected: Path) -> None:
    settings, wanted = read_plan(expected).settings, content(expected)
    for effect in count():
        out = folder / f"{effect}"
        status = run_and_die(out, settings, effect)
        if effect % 4 == 0:
            run_and_die(out, settings, 5)  # in the middle of the repair
        assert run_and_die(out, settings, None) == 0
        assert content(out) == wanted, f"killed before effect {effect}"
        if status != KILLED:
            assert status == 0
            print(effect)
            return


def run_and_die(out: Path, settings: PlanSettings, effect: int | None) -> int:
    """Build in a fork that dies just before the effect of this number, or never; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [effect]

    def dying(function):
        def run(*arguments, **named):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if left[0] is not None:
                left[0] -= 1
            return function(*arguments, **named)

        return run

    os.fsync, Path.replace, Path.unlink = dying(os.fsync), dying(Path.replace), dying(Path.unlink)
    status = 1
    try:
        build(out, settings, RUN)
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
