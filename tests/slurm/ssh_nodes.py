"""Real sshd on the nodes of a test cluster, and an `ssh` that needs no password there.

Everything lies in a folder of its own: keys, the server's and the client's config, and a program `ssh` that names the
latter, because OpenSSH looks for a user's files in the home directory of the password database alone.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from cluster import Cluster

PACKAGES = {
    "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh",
    "mpirun": "openmpi-bin",
}  # fmt: skip
START_LIMIT_S = 20

SERVER = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
"""

CLIENT = """
IdentityFile {folder}/user_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def missing(launcher: str) -> str | None:
    """What this machine lacks for a launcher that goes by ssh, in words; None if nothing."""
    programs, path = ("sshd", "ssh", "ssh-keygen", launcher), f"{os.environ['PATH']}:/usr/sbin"
    absent = [name for name in programs if shutil.which(name, path=path) is None]
    packages = dict.fromkeys(PACKAGES[name] for name in absent)
    return f"no {', '.join(absent)}: apt-get install {' '.join(packages)}" if absent else None


@contextlib.contextmanager
def ssh_between(cluster: Cluster, folder: Path) -> Iterator[Path]:
    """While it lasts, `ssh` of the folder that it gives reaches every node from the head and from every node."""
    for key in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key]
        subprocess.run(command, check=True)
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    programs = folder / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (programs / "ssh").chmod(0o755)
    # Where sshd locks itself in; each node gets a /run of its own.
    start = "mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec /usr/sbin/sshd -D -e -f $0"
    log = (folder / "sshd.log").open("wb")
    servers = [
        subprocess.Popen(cluster.on_node(node, ["bash", "-c", start, folder / "sshd_config"]), stdout=log, stderr=log)
        for node in cluster.nodes
    ]
    try:
        for node in cluster.nodes:
            deadline = time.monotonic() + START_LIMIT_S
            while cluster.run([programs / "ssh", node, "true"], check=False).returncode != 0:
                assert time.monotonic() < deadline, (folder / "sshd.log").read_text()
                time.sleep(0.05)
        yield programs
    finally:
        for server in servers:
            for sshd in psutil.Process(server.pid).children():  # nsenter ends with it
                sshd.kill()
            server.wait(timeout=20)
        log.close()
