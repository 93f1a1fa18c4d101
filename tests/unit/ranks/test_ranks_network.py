"""The interface between the nodes and the variables of gloo and NCCL: decisions on tables, and this very machine."""

import socket

import psutil
import pytest

from vitscale.errors import ExitStatus, LaunchError
from vitscale.ranks import network
from vitscale.ranks.network import choose_interface, find_interface, find_variables, network_variables
from vitscale.ranks.placement import Placement

ALONE = Placement(0, 1, 0, 1, "127.0.0.1", 0)
ONE_NODE = Placement(0, 2, 0, 2, "127.0.0.1", 29500)
TWO_NODES = Placement(0, 4, 0, 2, "node1", 29500, second_host="node2")

LAPTOP = {"lo": ["127.0.0.1", "::1"]}
NODE = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1", "fe80::1%eth0"]}
HOST_OF_CONTAINERS = {**NODE, "docker0": ["172.17.0.1"], "veth12": ["fe80::2%veth12"]}
FAT_NODE = {**NODE, "ib0": ["10.1.0.1"], "eth1": ["fd00:1::1", "fe80::3%eth1"]}


@pytest.mark.parametrize(
    ("sources", "interfaces", "name"),
    [
        (["10.0.0.1"], FAT_NODE, "eth0"),
        (["10.1.0.1", "10.0.0.1"], FAT_NODE, "ib0"),
        (["fd00:1::1"], FAT_NODE, "eth1"),
        (["fe80::3%eth1"], FAT_NODE, "eth1"),
        (["127.0.1.1", "10.0.0.1"], HOST_OF_CONTAINERS, "eth0"),
        (["127.0.1.1", "::1"], NODE, "eth0"),
        ([], NODE, "eth0"),
        (["127.0.1.1"], LAPTOP, "lo"),
        (["127.0.1.1"], HOST_OF_CONTAINERS, None),
        ([], FAT_NODE, None),
        (["10.9.9.9"], FAT_NODE, None),
        ([], {}, None),
    ],
)
def test_the_interface_that_leads_to_the_others(sources, interfaces, name):
    assert choose_interface(sources, interfaces) == name


LAZY = {"TORCH_GLOO_LAZY_INIT": "1"}
HEARTBEAT = {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600"}
ETH0 = {"GLOO_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize(
    ("placement", "gpus", "known", "variables"),
    [
        (ALONE, False, {}, {}),
        (ALONE, True, {}, HEARTBEAT),
        (ONE_NODE, False, {}, LAZY),
        (ONE_NODE, True, {}, {**LAZY, **HEARTBEAT}),
        (TWO_NODES, False, {}, {**LAZY, **ETH0}),
        (TWO_NODES, True, {}, {**LAZY, **ETH0, "NCCL_SOCKET_IFNAME": "=eth0", **HEARTBEAT}),
        (TWO_NODES, True, {"NCCL_SOCKET_IFNAME": "^docker"}, {**LAZY, **ETH0, **HEARTBEAT}),
        (TWO_NODES, True, {**ETH0, **HEARTBEAT}, {**LAZY, "NCCL_SOCKET_IFNAME": "=eth0"}),
        (TWO_NODES, False, {"GLOO_SOCKET_IFNAME": "", "TORCH_GLOO_LAZY_INIT": "0"}, ETH0),
    ],
)
def test_only_what_is_needed_and_not_set_is_set(placement, gpus, known, variables):
    interface = "eth0" if placement.spans_nodes else None
    assert network_variables(placement, interface, gpus, timeout_s=600.0, known=known) == variables


def test_the_users_interface_is_nccls_too_and_nothing_is_looked_for():
    placement = Placement(0, 4, 0, 2, "no-such-host.invalid", 29500)
    assert find_variables(placement, True, 600.0, {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_CONF_FILE": "/none"}) == {
        "NCCL_SOCKET_IFNAME": "=eth7",
        **LAZY,
        **HEARTBEAT,
    }


def test_what_is_in_nccls_file_is_left_alone(tmp_path):
    file = tmp_path / "nccl.conf"
    file.write_text("# NCCL_DEBUG=INFO\nNCCL_SOCKET_IFNAME = ib0\n")
    environ = {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_CONF_FILE": str(file)}
    assert find_variables(TWO_NODES, True, 600.0, environ) == {**LAZY, **HEARTBEAT}


def addresses_of(name: str) -> set[str]:
    return {entry.address for entry in psutil.net_if_addrs()[name]}


@pytest.mark.parametrize("master", ["127.0.0.1", "::1", "localhost"])
def test_a_master_on_the_loopback_is_reached_by_an_interface_of_this_machine(master):
    # Outside of this machine, if there is a way out; else over the loopback.
    assert addresses_of(find_interface(Placement(0, 2, 0, 1, master, 29500)))


def test_an_address_of_this_machine_is_on_its_own_interface():
    own = network._interfaces()
    for name, addresses in own.items():
        for address in addresses:
            if not network._address(address).is_loopback and "%" not in address:
                assert find_interface(Placement(0, 2, 0, 1, address, 29500)) == name


def test_a_host_without_address_is_worth_another_try():
    with pytest.raises(LaunchError, match=r"^no-such-host\.invalid: .* finds no address .* MASTER_ADDR$") as caught:
        find_interface(Placement(1, 2, 0, 1, "no-such-host.invalid", 29500))
    assert caught.value.status == ExitStatus.TRANSIENT


def test_two_ways_out_are_told_with_the_mend(monkeypatch):
    monkeypatch.setattr(network, "_interfaces", lambda: HOST_OF_CONTAINERS)
    monkeypatch.setattr(network, "_sources", lambda host: ["127.0.1.1"])
    words = "no one of lo, eth0, docker0, veth12 is clearly the way to node1: set GLOO_SOCKET_IFNAME"
    with pytest.raises(LaunchError, match=f"^{socket.gethostname()}: {words}"):
        find_interface(TWO_NODES)
