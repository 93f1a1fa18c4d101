"""The network between the ranks of a run: which interface, and what gloo and NCCL have to be told.

Left alone, gloo takes the interface that the node's own name resolves to. That is 127.0.1.1 on Debian, where no other
node finds it. What leads to rank 0's node is right, so the kernel's routes are asked; `choose_interface` and
`network_variables` decide, `find_variables` looks.
"""

import contextlib
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from vitscale.errors import ExitStatus, LaunchError
from vitscale.ranks.placement import Placement

ANYWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses kept for documentation: what leads there is the default route, of IPv4 and of IPv6."""


def find_variables(placement: Placement, gpus: bool, timeout_s: float, environ: Mapping[str, str]) -> dict[str, str]:
    """What `network_variables` decides for this rank on this machine.

    Raises:
        LaunchError: the node has no clear way to rank 0's.
    """
    interface = None
    if placement.spans_nodes:
        interface = environ.get("GLOO_SOCKET_IFNAME") or find_interface(placement)
    known = {**_nccl_settings(environ), **environ} if gpus else environ
    return network_variables(placement, interface, gpus, timeout_s, known)


def network_variables(
    placement: Placement, interface: str | None, gpus: bool, timeout_s: float, known: Mapping[str, str]
) -> dict[str, str]:
    """The variables of gloo and NCCL that a rank needs and nobody has set.

    Args:
        placement: of the rank.
        interface: the one to the other nodes, or several with commas between; None for a run on one node.
        gpus: whether NCCL is used.
        timeout_s: after which a collective fails.
        known: what is set already, in the environment or in NCCL's own files.
    """
    wanted = {}
    if placement.world_size > 1:
        # Left alone, every rank connects to every other when a group is made, and asks rank 0's store for all their
        # addresses: minutes of rank 0's time at 1,000 ranks, for the twenty connections that a rank uses.
        wanted["TORCH_GLOO_LAZY_INIT"] = "1"
    if placement.spans_nodes and interface is not None:
        wanted["GLOO_SOCKET_IFNAME"] = interface
        if gpus:
            # For sockets alone: InfiniBand and RoCE are found by themselves. `=`: NCCL reads a prefix otherwise.
            wanted["NCCL_SOCKET_IFNAME"] = f"={interface}"
    if gpus:
        # torch ends a process whose CUDA hangs after 480 s (HeartbeatMonitor in its ProcessGroupNCCL.cpp). Our
        # watchdog needs 480 + 60 s to name the rank and to dump the stacks, and a collective fails after timeout_s.
        wanted["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = f"{timeout_s:.0f}"
    return {name: value for name, value in wanted.items() if not known.get(name)}


def choose_interface(sources: Sequence[str], interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """The interface that leads to the other nodes; None where several may.

    Args:
        sources: addresses of this node from which other hosts of the run, and then any others, would be reached: the
            first that is no loopback counts.
        interfaces: the IP addresses of each interface that is up. Where no source tells, the only one beside the
            loopback is taken; with the loopback alone all ranks must be on this machine.
    """
    outward = {
        name: {address for address in map(_address, addresses) if not address.is_loopback}
        for name, addresses in interfaces.items()
    }
    for source in map(_address, sources):
        for name, addresses in outward.items():
            if source in addresses:
                return name
    # The inner ends of containers' and virtual machines' networks have addresses of their link at most.
    usable = [name for name, addresses in outward.items() if any(not address.is_link_local for address in addresses)]
    usable = usable or [name for name, addresses in interfaces.items() if addresses and not outward[name]]
    return usable[0] if len(usable) == 1 else None


def find_interface(placement: Placement) -> str:
    """The interface of this node that leads to the other nodes of the run.

    On rank 0's own node its name may mean the loopback: there the way to another host counts, or the default route.

    Raises:
        LaunchError: a host of the run has no address here, or no one interface can be told.
    """
    hosts = [placement.master_addr, *([placement.second_host] if placement.second_host else [])]
    sources = []
    for host in (*hosts, *ANYWHERE):
        try:
            sources += _sources(host)
        except socket.gaierror as reason:
            error = LaunchError(
                f"{host}: {socket.gethostname()} finds no address for this host of the run ({reason.strerror}): mend "
                "its name service, or (not under Slurm) give an address as MASTER_ADDR"
            )
            error.status = ExitStatus.TRANSIENT  # a name server may be out for a moment
            raise error from None
    interfaces = _interfaces()
    name = choose_interface(sources, interfaces)
    if name is None:
        raise LaunchError(
            f"{socket.gethostname()}: no one of {', '.join(interfaces)} is clearly the way to {placement.master_addr}: "
            "set GLOO_SOCKET_IFNAME to the interface between the nodes"
        )
    return name


def _nccl_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What NCCL reads from its files: the site's, and the user's or the one named by NCCL_CONF_FILE."""
    settings = {}
    for file in (environ.get("NCCL_CONF_FILE") or "~/.nccl.conf", "/etc/nccl.conf"):
        with contextlib.suppress(OSError):
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
            pairs = (line.split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith("#"))
            settings.update({name.strip(): value.strip() for name, value in pairs})
    return settings


def _sources(host: str) -> list[str]:
    """This node's addresses that packets to `host` would carry; connecting a UDP socket sends none."""
    found = []
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            found.append(str(probe.getsockname()[0]))
    return found


def _interfaces() -> dict[str, list[str]]:
    states = psutil.net_if_stats()
    return {
        name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text.partition("%")[0])  # fe80::1%eth0
