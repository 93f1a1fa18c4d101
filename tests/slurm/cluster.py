"""A real Slurm cluster on this machine, for tests: one controller and a few nodes, each in namespaces of its own.

Every node has its own network address, host name and process ids, as a machine of a cluster has; they share
the file system, as the machines of a cluster do. All of it lives in a private network that this machine's own
does not touch, and dies with the process that started it, even if that is killed. There is no accounting.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

HEAD = "vshead"
HEAD_ADDRESS = "10.43.0.254"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "unshare", "nsenter", "setpriv")
START_LIMIT_S = 60
GRACE_S = 20
"""From a preempted job's SIGTERM to its end."""

# The head and the nodes begin alike: a host name, and names that resolve from files alone, so that no look-up
# ever waits for a name server out of reach. The process that runs this is the first of its process namespace:
# when it ends, the kernel ends all others in there.
DRESS = """
set -eu
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
"""

HEAD_SCRIPT = f"""{DRESS}
ip link add br0 type bridge
ip address add {HEAD_ADDRESS}/24 dev br0
ip link set br0 up
munged --foreground --force --key-file="$2/munge.key" --socket="$2/munge/socket" --pid-file="$2/munge/pid" \
    --seed-file="$2/munge/seed" --log-file="$2/munged.log" --num-threads=2 &
until [ -S "$2/munge/socket" ]; do sleep 0.02; done
slurmctld -D -f "$2/slurm.conf" &
wait
"""

NODE_SCRIPT = f"""{DRESS}
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add "$3/24" dev eth0
ip link set eth0 up
slurmd -D -N "$1" -f "$2/slurm.conf" &
wait
"""

# A requeued job may start again cred_expire + 1 seconds after its end: 121 by default, and 6 at the least.
SLURM_CONF = """
ClusterName=vitscale
SlurmctldHost={head}({head_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmdTimeout=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1024
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


class ClusterError(Exception):
    """The cluster did not come up, or a job did not get where it was waited for."""


@contextlib.contextmanager
def started_cluster(nodes: int) -> "Iterator[Cluster]":
    """A cluster for the time of the block; the test is skipped where there can be none."""
    if lack := missing():
        pytest.skip(f"no Slurm cluster here: {lack}")
    root = Path(tempfile.mkdtemp(prefix="vs-slurm-"))
    cluster = Cluster(root, nodes)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root)


def missing() -> str | None:
    """What this machine lacks for a cluster, in words; None if nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
    if os.geteuid() != 0:
        return "needs root, to give each node namespaces of its own"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        return "needs the right to make namespaces, which this container lacks (unshare fails)"
    return None


class Cluster:
    """A running cluster. `root` is a folder of its own with a short path, for sockets lie in it."""

    def __init__(self, root: Path, nodes: int = 2) -> None:
        self.root = root
        self.nodes = {f"vsn{i}": f"10.43.0.{i}" for i in range(1, nodes + 1)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring it up; back when every node takes jobs."""
        self._write_files()
        try:
            self._spawn(HEAD, HEAD_SCRIPT)
            self._await(self._controller_answers, "slurmctld does not answer")
            for name, address in self.nodes.items():
                self._spawn(name, NODE_SCRIPT, address)
                self._plug_in(name)
            self._await(self._nodes_idle, "a node does not register")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything that was started; the folder stays, with the logs."""
        for process in self._processes.values():
            # unshare ends once its child is gone, and with that all that ran in the namespaces.
            for ended in psutil.Process(process.pid).children() or [process]:
                ended.kill()
        for process in self._processes.values():
            process.wait(timeout=20)

    def run(
        self, command: Sequence[str | Path], check: bool = True, cwd: Path = Path("/"), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the head, as a user of the cluster does who is logged in there."""
        environ = {**os.environ, "PATH": _search_path(), "SLURM_CONF": str(self.root / "slurm.conf"), **variables}
        done = subprocess.run(
            [*self._enter(HEAD), f"--wdns={cwd}", "--", *command],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode != 0:
            raise ClusterError(f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def on_node(self, node: str, command: Sequence[str | Path], cwd: Path = Path("/")) -> list[str | Path]:
        """The command as it runs on a node, for `subprocess`: in all of the node's namespaces."""
        enter = ["nsenter", "--target", str(self._pid(node)), "--net", "--uts", "--mount", "--pid", f"--wdns={cwd}"]
        return [*enter, "--", *command]

    def cut(self, node: str) -> None:
        """Pull the node's cable: what runs there goes on, and reaches nobody."""
        self.run(["ip", "link", "set", node, "down"])

    def plug_in_again(self, node: str) -> None:
        """Undo `cut`."""
        self.run(["ip", "link", "set", node, "up"])

    def kill_node(self, node: str) -> None:
        """Cut the node's power: nobody sees its connections end."""
        self.cut(node)
        psutil.Process(self._pid(node)).kill()
        self._processes.pop(node).wait(timeout=20)
        self.run(["ip", "link", "delete", node])

    def boot_node(self, node: str) -> None:
        """Switch a killed node on again."""
        self._spawn(node, NODE_SCRIPT, self.nodes[node])
        self._plug_in(node)

    def restart_controller(self) -> None:
        """Kill slurmctld and start it anew."""
        environ = {**os.environ, "PATH": _search_path(), "SLURM_CONF": str(self.root / "slurm.conf")}
        kill = ["bash", "-c", f'kill -9 "$(cat {self.root / "slurmctld.pid"})"']
        for command in (kill, ["slurmctld", "-f", self.root / "slurm.conf"]):
            subprocess.run(self.on_node(HEAD, command), env=environ, check=True, timeout=60)
        self._await(self._controller_answers, "slurmctld does not come back")

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job, by the names `scontrol show job` uses."""
        shown = self.run(["scontrol", "--oneliner", "show", "job", job_id]).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for_job(self, job_id: str, states: Sequence[str], limit_s: float) -> dict[str, str]:
        """Wait until the job is in one of `states`; its fields then."""
        deadline = time.monotonic() + limit_s
        while (job := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job_id} is {job['JobState']} after {limit_s} s, not {' or '.join(states)}")
            time.sleep(0.2)
        return job

    def _write_files(self) -> None:
        for folder in ("munge", "state", "spool"):
            (self.root / folder).mkdir()
        for name in self.nodes:
            (self.root / "spool" / name).mkdir()
        (self.root / "munge").chmod(0o755)
        (self.root / "munge.key").touch(mode=0o600)
        (self.root / "munge.key").write_bytes(os.urandom(128))
        addresses = {"localhost": "127.0.0.1", HEAD: HEAD_ADDRESS, **self.nodes}
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        databases = ("passwd", "group", "shadow", "hosts", "networks", "protocols", "services")
        (self.root / "nsswitch.conf").write_text("".join(f"{name}: files\n" for name in databases))
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} CPUs=4 RealMemory=8192" for name, address in self.nodes.items()
        )
        text = SLURM_CONF.format(head=HEAD, head_address=HEAD_ADDRESS, root=self.root, nodes=nodes, grace_s=GRACE_S)
        (self.root / "slurm.conf").write_text(text)
        # slurmd looks for mounted control groups unless it is told which version not to use.
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _spawn(self, name: str, script: str, *arguments: str) -> None:
        # The two flags pass the death of this process on: to unshare, and from there to its child.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child"]
        command += ["--net", "--uts", "--mount", "--pid", "--fork"]
        with (self.root / f"{name}.out").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [*command, "bash", "-c", script, "bash", name, str(self.root), *arguments],
                env={**os.environ, "PATH": _search_path(), "SLURM_CONF": str(self.root / "slurm.conf")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _pid(self, name: str) -> int:
        """The first process of the head's or a node's namespaces: the only child of `unshare`."""
        unshare = psutil.Process(self._processes[name].pid)
        self._await(lambda: len(unshare.children()) == 1, f"{name} does not start")
        return unshare.children()[0].pid

    def _enter(self, name: str) -> list[str]:
        return ["nsenter", "--target", str(self._pid(name)), "--net", "--uts", "--mount"]

    def _plug_in(self, node: str) -> None:
        pid = str(self._pid(node))
        self.run(["ip", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", pid])
        self.run(["ip", "link", "set", node, "master", "br0", "up"])

    def _controller_answers(self) -> bool:
        return "is UP" in self.run(["scontrol", "ping"], check=False).stdout

    def _nodes_idle(self) -> bool:
        return self.run(["sinfo", "--noheader", "--format=%T %D"]).stdout.split() == ["idle", str(len(self.nodes))]

    def _await(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not ready():
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "".join(f"\n{log}:\n{log.read_text()[-800:]}" for log in self._logs())
                raise ClusterError(f"{what}{' (' + dead[0] + ' ended)' if dead else ''}{logs}")
            time.sleep(0.05)

    def _logs(self) -> list[Path]:
        return [log for log in sorted([*self.root.glob("*.log"), *self.root.glob("*.out")]) if log.stat().st_size]


def _search_path() -> str:
    """Debian puts the daemons where only root looks."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
