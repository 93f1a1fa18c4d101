"""Who meets whom in the network check, and what its figures say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.train.preflight.pairs import ROUNDS, bus_bandwidth, cut_off, rounds_of_pairs, slow_nodes
from vitscale.train.preflight.reports import Pair

NAMES = st.lists(st.text("abc123", min_size=1), max_size=40, unique=True)


@given(NAMES, st.integers(0, 50))
def test_nobody_meets_two_at_once_or_anybody_twice(nodes, count):
    rounds = rounds_of_pairs(nodes, count)
    for met in rounds:
        busy = [node for pair in met for node in pair]
        assert len(busy) == len(set(busy))
        assert set(busy) <= set(nodes)
        assert len(nodes) - len(busy) == len(nodes) % 2
    everybody = [frozenset(pair) for met in rounds for pair in met]
    assert len(everybody) == len(set(everybody))


@given(NAMES)
def test_enough_rounds_are_a_whole_tournament(nodes):
    everybody = {frozenset(pair) for met in rounds_of_pairs(nodes, len(nodes) + 1) for pair in met}
    assert len(everybody) == len(nodes) * (len(nodes) - 1) // 2


def test_bus_bandwidth_is_that_of_nccl_tests():
    # all_reduce_perf and all_gather_perf of nccl-tests on 8 ranks: 1 GB in 10 ms is algbw 100, busbw 175 and 87.5 GB/s.
    assert bus_bandwidth("all-reduce", 10**9, 0.01, 8) == pytest.approx(175e9)
    assert bus_bandwidth("all-gather", 10**9, 0.01, 8) == pytest.approx(87.5e9)
    assert bus_bandwidth("all-reduce", 10**9, 0.01, 1) == 0


def best_of_pairs(nodes, slow, rate=10e9):
    """The best pair of each node where a pair is as slow as its slower node."""
    best = dict.fromkeys(nodes, 0.0)
    for met in rounds_of_pairs(nodes):
        for pair in met:
            for node in pair:
                best[node] = max(best[node], min(slow.get(other, rate) for other in pair))
    return best


@given(st.integers(3, 60), st.data())
def test_one_slow_node_is_found_wherever_it_stands(count, data):
    nodes = [f"n{i}" for i in range(count)]
    slow = data.draw(st.sampled_from(nodes))
    rate = data.draw(st.floats(0.001e9, 4.9e9))
    assert slow_nodes(best_of_pairs(nodes, {slow: rate})) == {slow}


@given(st.integers(0, 60), st.floats(5.1e9, 10e9), st.data())
def test_what_is_near_the_others_is_not_slow(count, rate, data):
    nodes = [f"n{i}" for i in range(count)]
    slower = data.draw(st.lists(st.sampled_from(nodes), max_size=count)) if nodes else []
    assert slow_nodes(best_of_pairs(nodes, dict.fromkeys(slower, rate))) == set()


def test_of_two_nodes_none_can_be_called_slow():
    assert slow_nodes(best_of_pairs(["a", "b"], {"a": 1.0})) == set()


def test_a_node_without_traffic_is_told_from_its_peers():
    dead, alive = Pair("x", None, "timed out"), Pair("x", 1e9)

    def pairs(**kinds):
        return {
            node: [Pair(peer, kind.bus_bytes_per_s, kind.fault) for peer, kind in own] for node, own in kinds.items()
        }

    met = pairs(a=[("b", dead), ("c", alive)], b=[("a", dead), ("c", dead)], c=[("b", dead), ("a", alive)])
    assert cut_off(met) == {"b"}
    # A peer that is gone speaks against nobody; one that nobody reaches is not counted for those it did not reach.
    assert cut_off(pairs(a=[("gone", dead)], c=[("a", alive)])) == set()
    assert cut_off(pairs(a=[("b", dead)], b=[("a", dead)])) == {"a", "b"}
    assert cut_off({"a": []}) == set()
    assert ROUNDS >= 2  # with one peer a node could not be told from it
