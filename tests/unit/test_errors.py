import errno
import os

import pytest

from vitscale import errors
from vitscale.errors import DivergenceError, ExitStatus, ShardError, VitscaleError


def test_exit_statuses_are_the_documented_numbers():
    assert {status.name: status.value for status in ExitStatus} == {
        "FINISHED": 0,
        "TRANSIENT": 1,
        "USER_ERROR": 2,
        "DIVERGED": 3,
        "RUN_AGAIN": 75,
    }


FAMILY = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VitscaleError)]


@pytest.mark.parametrize("kind", FAMILY)
def test_every_error_but_divergence_is_one_the_user_can_mend(kind):
    assert kind("what: where: the mend").status == (
        ExitStatus.DIVERGED if kind is DivergenceError else ExitStatus.USER_ERROR
    )


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.ESTALE, ExitStatus.TRANSIENT),
        (errno.EIO, ExitStatus.TRANSIENT),
        (errno.ESHUTDOWN, ExitStatus.TRANSIENT),
        (errno.ENOSPC, ExitStatus.USER_ERROR),
        (errno.EACCES, ExitStatus.USER_ERROR),
        (errno.ENOENT, ExitStatus.USER_ERROR),
    ],
)
def test_a_fault_that_may_pass_is_worth_another_try(number, status):
    error = ShardError.of_system(OSError(number, os.strerror(number)), "what: where: the mend")
    assert (type(error), str(error), error.status) == (ShardError, "what: where: the mend", status)
