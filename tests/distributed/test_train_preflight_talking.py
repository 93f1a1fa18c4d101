"""The network check among real processes, each of which stands for a node: a slow one, one that hangs, one that never
comes."""

import contextlib
import os
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from batch_script import PREFLIGHT_LIMIT_S
from distributed_runner import run_distributed_test
from free_port import free_port

from vitscale.errors import LaunchError
from vitscale.train.preflight import measure, meeting
from vitscale.train.preflight.choice import choose, judge
from vitscale.train.preflight.gates import all_come, store_at
from vitscale.train.preflight.measure import matmul_rate, try_device
from vitscale.train.preflight.meeting import attend, draw_roster
from vitscale.train.preflight.node import CHECKS_LIMIT_S
from vitscale.train.preflight.reports import Finding, NodeReport, RankReport, Stage, Standing, read_reports
from vitscale.train.preflight.rules import Evidence
from vitscale.train.preflight.seat import Limits, Progress, Seat

CPU = torch.device("cpu")
USUAL_S, SLOW_S = 0.02, 0.3
"""Of a collective in a pair: both far above what this machine's other work adds to it."""
FLOPS_PER_S = 1e9


def node_report(node, torch="2.15.0", findings=()):
    return NodeReport(node, {"torch": torch}, tuple(findings))


def attend_as(rank, world_size, port, folder, limits, versions=None):
    """Rank r is the only one of node r."""
    seat = Seat(f"n{rank}", rank, world_size, 0, 1, CPU)
    return attend(
        seat,
        folder,
        open_store=lambda: store_at(seat, "127.0.0.1", port, limits),
        inspect=lambda: node_report(seat.node, (versions or {}).get(rank, "2.15.0")),
        limits=limits,
    )


def evidence(folder, count):
    nodes = [f"n{rank}" for rank in range(count)]
    return Evidence(nodes, *read_reports(folder, nodes), tasks_per_node=1)


def one_is_slow(rank, world_size, port, folder):
    real = dist.all_reduce

    def delayed(tensor, async_op):
        if dist.get_world_size() == 2:
            time.sleep(SLOW_S if rank == 2 else USUAL_S)
        return real(tensor, async_op=async_op)

    # As on a node whose link is bad, but for the talk of all ranks, which is told by nobody and would take long. The
    # ranks share this machine's cores, so that what those do is no part of it.
    devices = mock.patch.object(measure, "matmul_rate", return_value=(FLOPS_PER_S, True))
    with mock.patch.object(dist, "all_reduce", delayed), devices:
        attend_as(rank, world_size, port, folder, Limits(wait_s=60))


@pytest.mark.fault(24)
def test_a_slow_node_is_named_by_its_pairs(tmp_path):
    run_distributed_test(one_is_slow, 4, free_port(), tmp_path, init=False)
    found = evidence(tmp_path, 4)
    assert [rank.stage for rank in found.ranks] == [Stage.OVER] * 4
    assert [len(rank.pairs) for rank in found.ranks] == [3] * 4
    assert [(t.collective, t.size_bytes) for t in found.ranks[0].transfers] == [
        ("all-reduce", 1 << 16), ("all-reduce", 1 << 20), ("all-reduce", 4 << 20),
        ("all-gather", 1 << 16), ("all-gather", 1 << 20), ("all-gather", 4 << 20),
    ]  # fmt: skip
    assert [rank.flops_per_s for rank in found.ranks] == [FLOPS_PER_S] * 4
    assert [(verdict.node, verdict.faults) for verdict in judge(found) if verdict.slow or verdict.faults] == [
        ("n2", ())
    ]
    assert choose(found, 3, 3, lambda nodes: nodes).used == ("n0", "n1", "n3")
    # 4 MiB take rank 2 its sleep at least: 2 (n - 1) / n is 1 for two ranks.
    assert max(pair.bus_bytes_per_s for pair in found.ranks[2].pairs) < (4 << 20) / SLOW_S


def some_are_broken(rank, world_size, port, folder):
    """Of five nodes the last never comes; rank 3 stops when it is to talk, rank 2 has other versions."""
    stopped = mock.patch.object(meeting, "talk", return_value=None)
    began_s = time.monotonic()
    with stopped if rank == 3 else contextlib.nullcontext():
        attend_as(rank, world_size + 1, port, folder, Limits(wait_s=2, pair_s=2, all_ranks_s=20), {2: "2.14.0"})
    return time.monotonic() - began_s


def test_what_never_comes_or_hangs_is_named_and_the_others_go_on(tmp_path):
    took_s = run_distributed_test(some_are_broken, 4, free_port(), tmp_path, init=False)
    assert max(took_s) < 30
    found = evidence(tmp_path, 5)
    told = {verdict.node: verdict.faults for verdict in judge(found) if verdict.faults}
    assert list(told) == ["n2", "n3", "n4"]
    assert told["n2"] == ("torch 2.14.0, most nodes have 2.15.0: load the same modules or the same image there",)
    assert "hung or was killed" in told["n3"][0]
    assert "no report" in told["n4"][0]
    by_node = {rank.node: rank for rank in found.ranks}
    assert (by_node["n2"].left_out, by_node["n2"].pairs) == (True, ())
    for node in ("n0", "n1"):
        assert by_node[node].stage == Stage.OVER
        assert {pair.peer: pair.fault for pair in by_node[node].pairs} == {
            "n3": "not all ranks came", ({"n0", "n1"} - {node}).pop(): "",
        }  # fmt: skip
        assert len(by_node[node].transfers) == 6
    assert choose(found, 2, 2, lambda nodes: nodes).used == ("n0", "n1")


def test_a_rank_alone_has_nobody_to_talk_to(tmp_path):
    found = attend_as(0, 1, free_port(), tmp_path, Limits(wait_s=5))
    assert (found.stage, found.fault, found.pairs, found.transfers) == (Stage.OVER, "", (), ())
    assert choose(evidence(tmp_path, 1), 1, 1, lambda nodes: nodes).used == ("n0",)


def test_rank_0_whose_port_is_taken_says_so(tmp_path):
    with mock.patch.object(meeting, "check_network") as talked:
        port = free_port()
        taken = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        found = attend_as(0, 2, port, tmp_path, Limits())
        del taken
    assert (found.stage, found.fault.startswith("no way to rank 0: ")) == (Stage.COMPUTE, True)
    assert not talked.called
    assert (tmp_path / "n0.json").exists()


def test_a_rank_that_finds_no_rank_0_says_so_in_time(tmp_path):
    limits = Limits(wait_s=0.1, inspection_s=0.1, device_s=0.1)
    with mock.patch.object(os, "_exit"):  # on a machine that is busy these are short
        found = attend_as(1, 2, free_port(), tmp_path, limits)
    assert (found.stage, found.fault.startswith("no way to rank 0: ")) == (Stage.MEETING, True)


def test_a_node_without_a_way_to_the_others_says_so(tmp_path):
    def open_store():
        raise LaunchError("n1: no one of lo, eth0, eth1 is clearly the way to n0: set GLOO_SOCKET_IFNAME")

    seat = Seat("n1", 1, 2, 0, 1, CPU)
    found = attend(seat, tmp_path, open_store=open_store, inspect=lambda: node_report("n1"), limits=Limits())
    assert found.fault.startswith("no way to rank 0: n1: no one of lo, eth0, eth1 is clearly the way to n0")


def test_a_check_that_hangs_ends_the_process_with_its_place_on_record(tmp_path):
    ended = threading.Event()
    progress = Progress(tmp_path, Seat("n0", 0, 1, 0, 1, CPU))
    progress.note(stage=Stage.PAIRS)
    with mock.patch.object(os, "_exit", side_effect=lambda status: ended.set()), progress.bounded(0.01):
        assert ended.wait(10)
    assert [rank.stage for rank in evidence(tmp_path, 1).stuck] == [Stage.PAIRS]


def test_a_gate_opens_once_all_are_there():
    seat = Seat("n0", 0, 2, 0, 1, CPU)
    store = store_at(seat, "127.0.0.1", free_port(), Limits())
    assert not all_come(store, "gate", 2, limit_s=0.1)
    assert all_come(store, "gate", 2, limit_s=0.1)


def test_a_launcher_gives_a_preflight_the_time_that_its_parts_may_take():
    limits, start_s = Limits(), 60
    assert limits.inspection_s > CHECKS_LIMIT_S
    assert start_s + limits.coming_s + limits.total_s + limits.pair_s <= PREFLIGHT_LIMIT_S


def ranks_of(*nodes, fault=""):
    return [RankReport(node, rank, rank % 2, "cpu", fault=fault) for rank, node in enumerate(nodes)]


def test_who_takes_part():
    reports = {node: node_report(node) for node in ("a", "b", "c")}
    everyone = ranks_of("a", "a", "b", "b", "c", "c")
    assert draw_roster(reports, everyone, 2) == {"a": [0, 1], "b": [2, 3], "c": [4, 5]}
    assert draw_roster(reports, everyone[:3] + everyone[4:], 2) == {"a": [0, 1], "c": [4, 5]}
    assert draw_roster({k: reports[k] for k in "ac"}, everyone, 2) == {"a": [0, 1], "c": [4, 5]}
    assert draw_roster(reports | {"b": node_report("b", "2.14.0")}, everyone, 2) == {"a": [0, 1], "c": [4, 5]}
    broken = node_report("b", findings=[Finding("data", Standing.MEND, "no shards")])
    assert draw_roster(reports | {"b": broken}, everyone, 2) == {"a": [0, 1], "c": [4, 5]}
    faulty = [*everyone[:3], RankReport("b", 3, 1, "cpu", fault="ECC"), *everyone[4:]]
    assert draw_roster(reports, faulty, 2) == {"a": [0, 1], "c": [4, 5]}
    # As arbitrary and cyclic distributions have them.
    assert draw_roster(reports, ranks_of("a", "b", "a", "b"), 2) == {"a": [0, 2], "b": [1, 3]}


def test_a_device_is_measured_and_its_errors_are_told(monkeypatch):
    rate, same = matmul_rate(CPU)
    assert rate > 1e8
    assert same
    assert try_device(CPU)[1] == ""
    monkeypatch.setattr("vitscale.train.preflight.measure.matmul_rate", lambda device: (1.0, False))
    assert try_device(CPU) == (1.0, "two products of the same matrices differ: replace the device")

    def broken(device):
        raise RuntimeError("CUDA error: device-side assert\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("vitscale.train.preflight.measure.matmul_rate", broken)
    assert try_device(CPU) == (None, "CUDA error: device-side assert")


def test_a_device_is_as_fast_as_it_is_after_a_while(monkeypatch):
    turns, now_s = iter(range(1000)), 0.0

    def wait(device):  # before and after each product, which takes twice as long when the device is hot
        nonlocal now_s
        now_s += next(turns) % 2 * (1 if now_s < 30 else 2)

    monkeypatch.setattr(measure, "_LOAD_S", {"cpu": 60.0})
    monkeypatch.setattr(measure, "_wait", wait)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now_s)
    assert matmul_rate(CPU)[0] == 2 * measure._SIDE["cpu"] ** 3 / 2


@pytest.mark.parametrize(("used", "fault"), [(3e9, ""), (40e9, "40 of its 80 GB are in use")])
def test_a_gpu_that_somebody_uses_is_a_fault(monkeypatch, used, fault):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9 - used, 80e9))
    monkeypatch.setattr("vitscale.train.preflight.measure.matmul_rate", lambda device: (1.0, True))
    assert try_device(torch.device("cuda", 0))[1].startswith(fault)
    assert bool(try_device(torch.device("cuda", 0))[1]) == bool(fault)
