"""Signals as they reach a process."""

import os
import signal
import subprocess
import sys

import pytest

from vitscale.errors import STOP_SIGNALS
from vitscale.train.stop import StopRequest


@pytest.fixture
def stop():
    """A request that listens, until the test is over."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_and_the_first_one_is_the_reason(stop, number):
    assert not stop.poll()
    os.kill(os.getpid(), number)
    assert stop.poll()
    assert stop.reason == f"received {signal.Signals(number).name}"
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == f"received {signal.Signals(number).name}"


@pytest.mark.fault(19)
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_are_ignored_while_a_save_runs(stop, number):
    with stop.shielded():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert not stop.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.poll()


SCRIPT = """
import os, signal, time
from vitscale.train.stop import StopRequest
stop = StopRequest()
stop.install()
os.kill(os.getpid(), signal.SIGINT)
assert stop.poll()
print("asked", flush=True)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


@pytest.mark.fault(19)
def test_a_second_interrupt_ends_the_process_at_once():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "asked\n"
    assert ended.returncode == -signal.SIGINT
