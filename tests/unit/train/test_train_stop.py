"""Signals as they reach a process."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from vitscale.errors import STOP_SIGNALS
from vitscale.train.stop import StopRequest


@pytest.fixture
def stop():
    """A request that listens, until the test is over."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    request = StopRequest()
    request.install()
    yield request
    signal.set_wakeup_fd(-1)
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


RANK = """
import time
from vitscale.train.stop import StopRequest
stop = StopRequest()
stop.install()
print("ready", flush=True)
while not stop.poll():
    time.sleep(0.05)
print(stop.reason, flush=True)
"""


@pytest.mark.fault(17)
def test_the_end_of_an_ssh_session_is_the_end_of_a_launcher():
    # deepspeed's processes on another machine hang on such a session, and on no other part of the launcher.
    session = [
        "bash",
        "-c",
        """exec -a 'sshd: me@notty' bash -c '"$0" -c "$1" & wait' "$0" "$1" """,
        sys.executable,
        RANK,
    ]
    with subprocess.Popen(session, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.readline() == f"the launcher (pid {process.pid}) is gone\n"


def test_the_signals_of_a_forked_child_are_its_own(stop):
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    time.sleep(0.2)
    assert not stop.poll()


def hang(pipe, shielded):
    stop = StopRequest()
    stop.install()

    def tell():
        while stop.reason is None:
            time.sleep(0.01)
        pipe.send((stop.reason, signal.getsignal(signal.SIGINT) == stop._handle))

    threading.Thread(target=tell, daemon=True).start()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    with stop.shielded() if shielded else contextlib.nullcontext():
        pipe.send("hangs")
        store.wait(["never"])


@contextlib.contextmanager
def hanging(shielded):
    """A process whose main thread waits in C++, where no handler of Python's runs."""
    context = multiprocessing.get_context("fork")
    pipe, other = context.Pipe()
    process = context.Process(target=hang, args=(other, shielded), daemon=True)
    process.start()
    try:
        assert pipe.poll(20)
        assert pipe.recv() == "hangs"
        time.sleep(0.3)
        yield process, pipe
    finally:
        process.kill()
        process.join()


@pytest.mark.fault(19)
def test_a_second_interrupt_ends_a_process_that_hangs_in_cpp():
    with hanging(shielded=False) as (process, pipe):
        os.kill(process.pid, signal.SIGINT)
        assert pipe.poll(20)
        assert pipe.recv() == ("received SIGINT", True), "the handler has not run, which would set the default"
        os.kill(process.pid, signal.SIGINT)
        process.join(20)
        assert process.exitcode == 128 + signal.SIGINT


@pytest.mark.fault(19)
def test_a_save_that_hangs_in_cpp_ignores_every_interrupt():
    with hanging(shielded=True) as (process, pipe):
        for _ in range(3):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.2)
        assert process.is_alive()
        assert not pipe.poll()
