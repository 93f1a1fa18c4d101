"""launch/deepspeed_hosts.py before it starts anything: the hostfile, the machines, and what the ranks are given."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import deepspeed_hosts
import pytest
from click.testing import CliRunner
from deepspeed_hosts import check_hosts, main, passed_on, read_hosts

from vitscale.errors import LaunchError


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder that is all of PATH, with a pdsh and an ssh that obeys on this very machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder / "pdsh", "exit 0")
    # ssh -o X -o Y HOST COMMAND
    write_program(folder / "ssh", '[ "$5" != gone ] || { echo "ssh: connect: No route" >&2; exit 255; }; eval "$6"')
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def deepspeed(tmp_path, monkeypatch) -> Path:
    """Where to write a program that is run in place of deepspeed, which is found as a module and not on PATH."""
    launcher = tmp_path / "modules" / "deepspeed" / "launcher"
    launcher.mkdir(parents=True)
    (launcher / "runner.py").write_text(f"import os, sys\nos.execv('{tmp_path}/deepspeed', sys.argv)\n")
    for folder in (launcher, launcher.parent):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return tmp_path / "deepspeed"


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_a_hostfile(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# ours\nnode1 slots=8\n\nnode2 slots=4 # half\n")
    assert read_hosts(file) == ["node1", "node2"]


@pytest.mark.parametrize("text", ["", "# none\n", "node1\n", "node1 slots=2\nnode2 8\n"])
def test_what_is_no_hostfile(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(LaunchError, match=r"hosts: wants lines `HOST slots=RANKS`, one a machine"):
        read_hosts(tmp_path / "hosts")


def test_machines_that_can_take_part(programs):
    check_hosts(["node1", "node2"])


def test_a_machine_out_of_reach_is_named(programs):
    words = r"^gone: ssh: connect: No route \(1 of 2 hosts\): `ssh gone true` must work without a password, and all"
    with pytest.raises(LaunchError, match=words):
        check_hosts(["node1", "gone"])


def test_a_machine_with_another_python_is_named(programs, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(LaunchError, match=r"^node1: has no /no/such/python, or no /.* \(1 of 1 hosts\)"):
        check_hosts(["node1"])


def test_without_pdsh_there_is_nothing_to_look_for(programs):
    (programs / "pdsh").unlink()
    with pytest.raises(LaunchError, match=r"^no pdsh on this machine: deepspeed starts the ranks by pdsh over ssh$"):
        check_hosts(["node1"])


def test_a_fault_is_one_line_and_status_2(programs, tmp_path):
    done = CliRunner().invoke(main, [str(tmp_path / "none"), "run.yaml"])
    assert done.exit_code == 2
    assert (
        done.stderr
        == f"error: {tmp_path}/none: No such file or directory: give a file with a line `HOST slots=RANKS` a machine\n"
    )


def test_settings_reach_the_ranks_and_secrets_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n\n")
    environ = {"OMP_NUM_THREADS": "4", "NCCL_DEBUG": "WARN", "AWS_SECRET_ACCESS_KEY": "s", "HOME": "/root"}
    lines = [*passed_on(environ, tmp_path / "exit.json")]
    assert lines == ["MINE=1", "OMP_NUM_THREADS=4", "NCCL_DEBUG=WARN", f"VITSCALE_EXIT_FILE={tmp_path}/exit.json"]


def test_the_command_and_its_status(programs, deepspeed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    write_program(deepspeed, 'echo "$*" >called; . "$DS_ENV_FILE"; echo \'{"status": 75}\' >"$VITSCALE_EXIT_FILE"')
    words = ["--master-addr", "node1", "hosts", "run.yaml", "a.b=c d", "--fresh"]
    done = subprocess.run([sys.executable, deepspeed_hosts.__file__, *words], timeout=60)
    assert done.returncode == 75
    command = (
        "--hostfile=hosts --master_port=29500 --master_addr=node1 --module vitscale train run.yaml a.b=c d --fresh\n"
    )
    assert (tmp_path / "called").read_text() == command
    assert not list(tmp_path.glob(".vitscale-exit-*"))


# As deepspeed does: it leaves when it is told to stop, and the ranks on the other machines take their time.
LEAVING = """
trap 'exit 1' TERM
. "$DS_ENV_FILE"
(
    trap "" TERM
    echo >started
    while [ ! -e told ]; do /bin/sleep 0.1; done
    echo '{"status": 75}' >"$VITSCALE_EXIT_FILE"
) &
wait
"""


def test_a_run_that_outlives_its_launcher_is_waited_for(programs, deepspeed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node1 slots=2\n")
    write_program(deepspeed, LEAVING)
    process = subprocess.Popen([sys.executable, deepspeed_hosts.__file__, "hosts", "run.yaml"])
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    (tmp_path / "told").touch()
    assert process.wait(timeout=20) == 75
