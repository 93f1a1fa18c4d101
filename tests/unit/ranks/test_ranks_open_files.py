"""The limit of open files, of real processes of their own."""

import resource
import subprocess
import sys

import pytest

LOOK = (
    "import resource, sys; from vitscale.ranks.open_files import allow_open_files; allow_open_files(int(sys.argv[1])); "
    "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
)


def limits_after(world_size, soft, hard):
    command = [sys.executable, "-c", LOOK, str(world_size)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    return [int(word) for word in done.stdout.split()] or done.stderr


@pytest.mark.parametrize(
    ("world_size", "soft", "hard", "after"),
    [
        (8, 1024, 8192, [1032, 8192]),
        (4096, 1024, 8192, [5120, 8192]),
        (4096, 6000, 8192, [6000, 8192]),
        (4096, 5120, 5120, [5120, 5120]),
    ],
)
def test_as_many_as_are_needed_and_no_more(world_size, soft, hard, after):
    assert limits_after(world_size, soft, hard) == after


def test_a_system_that_allows_too_few_is_told_with_the_mend():
    words = (
        "LaunchError: 4096 ranks need 5120 open files in rank 0, the system allows 4096: raise the hard limit (Limit"
    )
    assert words in limits_after(4096, 1024, 4096)
