"""The limit of open files, of real processes of their own."""

import resource
import subprocess
import sys

import pytest

LOOK = (
    "import resource, sys; from vitscale.ranks.open_files import allow_open_files; "
    "allow_open_files(*map(int, sys.argv[1:])); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
)


def limits_after(rank, world_size, soft, hard):
    command = [sys.executable, "-c", LOOK, str(rank), str(world_size)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    return [int(word) for word in done.stdout.split()] or done.stderr


@pytest.mark.parametrize(
    ("rank", "world_size", "soft", "hard", "after"),
    [
        (0, 8, 1024, 8192, [1032, 8192]),
        (0, 4096, 1024, 8192, [5120, 8192]),
        (5, 4096, 1024, 8192, [5120, 8192]),
        (0, 4096, 6000, 8192, [6000, 8192]),
        (0, 4096, 1024, 4500, [4500, 4500]),
        (0, 1, 1024, 1024, [1024, 1024]),
        (5, 4096, 1024, 4096, [4096, 4096]),
    ],
)
def test_as_many_as_are_needed_and_allowed(rank, world_size, soft, hard, after):
    assert limits_after(rank, world_size, soft, hard) == after


def test_a_system_that_allows_rank_0_too_few_is_told_with_the_mend():
    words = "LaunchError: 4096 ranks need 4352 open files in rank 0, the system allows 4096: raise the hard limit"
    assert words in limits_after(0, 4096, 1024, 4096)
