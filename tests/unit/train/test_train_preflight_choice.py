"""Which nodes a run gets, from reports as sound and broken nodes leave them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import ExitStatus
from vitscale.train.preflight.choice import choose, judge
from vitscale.train.preflight.reports import Finding, NodeReport, Pair, RankReport, Stage, Standing, Transfer
from vitscale.train.preflight.rules import Evidence, usual_facts

FACTS = {"python": "3.12.1", "torch": "2.15.0", "vitscale": "0.1.0+aaaa", "driver": "570.1"}
NODES = ("n1", "n2", "n3", "n4")
TASKS = 2


def all_of_them(available):
    return available


def node_report(node, facts=None, findings=()):
    return NodeReport(node, FACTS | (facts or {}), (Finding("config", Standing.SOUND, "12 steps"), *findings))


class Job:
    """Sound nodes, until something is changed."""

    def __init__(self, nodes=NODES):
        self.nodes = nodes
        self.reports = {node: node_report(node) for node in nodes}
        self.ranks = [
            RankReport(
                node,
                rank=TASKS * place + local,
                local_rank=local,
                device=f"cuda:{local}",
                stage=Stage.OVER,
                flops_per_s=700e12,
                pairs=tuple(Pair(peer, 100e9) for peer in nodes if peer != node),
                transfers=(Transfer("all-reduce", 1 << 20, 90e9),),
            )
            for place, node in enumerate(nodes)
            for local in range(TASKS)
        ]

    def change(self, node, local=None, **changes):
        self.ranks = [
            replace(rank, **changes) if rank.node == node and local in (None, rank.local_rank) else rank
            for rank in self.ranks
        ]

    def lose(self, node):
        del self.reports[node]
        self.ranks = [rank for rank in self.ranks if rank.node != node]

    @property
    def evidence(self):
        return Evidence(self.nodes, self.reports, self.ranks, TASKS)

    def choose(self, wanted, least=None, usable=all_of_them):
        return choose(self.evidence, wanted, least or wanted, usable)

    def told(self):
        """Node -> its faults."""
        return {verdict.node: " | ".join(verdict.faults) for verdict in judge(self.evidence) if verdict.faults}


@pytest.fixture
def job():
    return Job()


def test_sound_nodes_are_taken_as_they_come_and_the_rest_are_spare(job):
    assert job.told() == {}
    assert job.choose(3).used == ("n1", "n2", "n3")
    assert job.choose(4).used == NODES
    assert job.choose(4).status == ExitStatus.FINISHED


def no_report(job):
    job.lose("n2")


def a_failed_check(job):
    job.reports["n2"] = node_report("n2", findings=[Finding("space", Standing.MEND, "/run: no room: free some")])


def other_torch(job):
    job.reports["n2"] = node_report("n2", {"torch": "2.14.0"})


def no_such_library(job):
    job.reports["n2"] = NodeReport("n2", {k: v for k, v in FACTS.items() if k != "torch"}, ())


def a_rank_that_never_came(job):
    job.ranks = [rank for rank in job.ranks if (rank.node, rank.local_rank) != ("n2", 1)]


def a_rank_that_was_killed(job):
    job.change("n2", local=1, stage=Stage.PAIRS, pairs=(), transfers=())
    for node in ("n1", "n3", "n4"):  # which had no traffic with it
        others = tuple(Pair(peer, 100e9) for peer in NODES if peer not in (node, "n2"))
        job.change(node, pairs=(Pair("n2", None, "connection closed"), *others))


def a_broken_device(job):
    job.change("n2", local=0, stage=Stage.COMPUTE, fault="CUDA error: uncorrectable ECC error")
    job.change("n2", local=1, stage=Stage.MEETING, left_out=True)


def late(job):
    job.change("n2", stage=Stage.MEETING, left_out=True, pairs=(), transfers=())


def no_way_to_rank_0(job):
    job.change("n2", stage=Stage.MEETING, fault="no way to rank 0: timed out", pairs=(), transfers=())


def no_traffic(job):
    job.change("n2", pairs=tuple(Pair(peer, None, "timed out") for peer in ("n1", "n3", "n4")), transfers=())
    for node in ("n1", "n3", "n4"):
        others = tuple(Pair(peer, 100e9) for peer in NODES if peer not in (node, "n2"))
        job.change(node, pairs=(*others, Pair("n2", None, "timed out")))


def stuck_at_the_end(job):
    job.change("n2", local=1, stage=Stage.ALL_RANKS)
    for node in ("n1", "n3", "n4"):
        job.change(node, stage=Stage.ALL_RANKS, fault="timed out waiting for a rank")


def failed_at_the_end_alone(job):
    job.change("n2", local=1, stage=Stage.ALL_RANKS, fault="out of memory")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (no_report, "no report"),
        (a_failed_check, "/run: no room: free some"),
        (other_torch, "torch 2.14.0, most nodes have 2.15.0: load the same modules"),
        (no_such_library, "torch none, most nodes have 2.15.0"),
        (a_rank_that_never_came, "no word from its local rank 1"),
        (a_rank_that_was_killed, "rank 3 (cuda:1) hung or was killed in the network check by pairs"),
        (a_broken_device, "rank 2 (cuda:0): CUDA error: uncorrectable ECC error"),
        (late, "came too late for the network check"),
        (no_way_to_rank_0, "rank 3 (cuda:1): no way to rank 0: timed out"),
        (no_traffic, "no traffic with n1, n3, n4 (timed out)"),
        (stuck_at_the_end, "rank 3 (cuda:1) hung or was killed in the network check among all ranks"),
        (failed_at_the_end_alone, "rank 3 (cuda:1): out of memory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_node_alone_is_named_and_left_out(job, what, said):
    what(job)
    told = job.told()
    assert list(told) == ["n2"]
    assert said in told["n2"]
    assert job.choose(3).used == ("n1", "n3", "n4")
    assert job.choose(3, usable=lambda nodes: 2 if nodes == 3 else nodes).status == ExitStatus.TRANSIENT
    too_few = job.choose(4)
    assert (too_few.used, too_few.status) == ((), ExitStatus.TRANSIENT)
    assert "3 of 4 nodes can be used, the run needs 4" in too_few.reason
    assert job.choose(4, least=2, usable=lambda nodes: 2 if nodes == 3 else nodes).used == ("n1", "n3")


def test_rank_0_s_node_is_blamed_where_most_others_do_not_find_it(job):
    for node in ("n2", "n3"):
        job.change(node, stage=Stage.MEETING, fault="no way to rank 0: timed out", pairs=())
    assert list(job.told()) == ["n1"]
    assert "2 of 3 nodes do not reach it" in job.told()["n1"]
    assert job.choose(3).used == ("n2", "n3", "n4")
    # Where rank 0 itself is out, that is the cause, and told once.
    job.change("n1", local=0, stage=Stage.COMPUTE, fault="no way to rank 0: address in use")
    assert job.told() == {"n1": "rank 0 (cuda:0): no way to rank 0: address in use"}
    job.change("n1", local=0, stage=Stage.PAIRS, fault="")
    job.change("n3", stage=Stage.PAIRS, fault="rank 0 is gone: connection reset")
    assert job.told() == {
        "n1": "rank 0 (cuda:0) hung or was killed in the network check by pairs: see the job's log and that device"
    }
    job.change("n1", local=0, fault="rank 0 is gone: connection reset")
    assert job.told() == {"n1": "rank 0 (cuda:0): rank 0 is gone: connection reset"}
    job.lose("n1")
    assert list(job.told()) == ["n1"]


def test_ranks_that_hang_speak_against_their_own_nodes_alone(job):
    for node in ("n2", "n3"):  # a bad node, and the first that met it
        job.change(node, stage=Stage.PAIRS, pairs=(), transfers=())
    assert list(job.told()) == ["n2", "n3"]
    assert job.choose(2).used == ("n1", "n4")
    job = Job()
    job.change("n1", stage=Stage.PAIRS, pairs=(), transfers=())
    for node in ("n2", "n3", "n4"):
        job.change(node, stage=Stage.PAIRS, fault="rank 0 is gone, or the rank that leads: timed out", transfers=())
    assert list(job.told()) == ["n1"]
    assert job.choose(3).used == ("n2", "n3", "n4")


def test_a_slow_device_is_left_out_while_there_are_others(job):
    job.change("n1", local=1, flops_per_s=400e12)
    verdict = judge(job.evidence)[0]
    assert verdict.faults == ()
    assert "rank 1 (cuda:1) is slow: 400 TFLOP/s of matrix products, others 700" in verdict.slow[0]
    assert job.choose(3).used == ("n2", "n3", "n4")
    assert job.choose(4).used == NODES
    assert job.choose(4, least=3).used == ("n2", "n3", "n4")


def test_slow_nodes_are_used_where_the_run_would_lose_more_than_a_quarter_without_them(job):
    job.change("n1", local=1, flops_per_s=400e12)
    assert job.choose(4, least=1).used == ("n2", "n3", "n4")
    assert job.choose(4, least=1, usable=lambda nodes: 2 if nodes == 3 else nodes).used == NODES
    job.reports["n4"] = node_report("n4", findings=[Finding("space", Standing.MEND, "no room")])
    assert job.choose(4, least=1).used == ("n1", "n2", "n3")


def test_a_slow_network_is_left_out_while_there_are_others(job):
    job.change("n3", pairs=tuple(Pair(peer, 20e9) for peer in ("n1", "n2", "n4")))
    for node in ("n1", "n2", "n4"):
        pairs = [Pair(peer, 20e9 if peer == "n3" else 100e9) for peer in NODES if peer != node]
        job.change(node, pairs=tuple(pairs))
    assert [v.node for v in judge(job.evidence) if v.slow] == ["n3"]
    assert "its network is slow: 20 GB/s at best, others 100" in judge(job.evidence)[2].slow[0]
    assert job.choose(3).used == ("n1", "n2", "n4")


def test_warnings_leave_nobody_out(job):
    clock = Finding("clock", Standing.WARNING, "n2: its clock is 50 s behind")
    job.reports["n2"] = node_report("n2", {"driver": "580.2"}, [clock])
    verdict = judge(job.evidence)[1]
    assert verdict.faults == ()
    assert verdict.warnings[0] == clock.said
    assert "driver 580.2" in verdict.warnings[1]
    assert job.choose(4).used == NODES


def test_one_link_without_traffic_is_a_warning_at_both_ends(job):
    for node, peer in (("n1", "n2"), ("n2", "n1")):
        rest = tuple(Pair(other, 100e9) for other in ("n3", "n4"))
        job.change(node, pairs=(Pair(peer, None, "timed out"), *rest))
    assert job.told() == {}
    assert [v.warnings for v in judge(job.evidence)][:3] == [
        ("no traffic with n2: timed out",),
        ("no traffic with n1: timed out",),
        (),
    ]


@pytest.mark.parametrize(
    ("standing", "status"), [(Standing.MEND, ExitStatus.USER_ERROR), (Standing.AGAIN, ExitStatus.TRANSIENT)]
)
def test_what_fails_on_every_node_is_no_node_s_fault(job, standing, status):
    for node in NODES:
        job.reports[node] = node_report(node, findings=[Finding("data", standing, f"/shards: missing on {node}")])
    choice = job.choose(2)
    assert (choice.used, choice.status) == ((), status)
    assert choice.reason == "on every node: /shards: missing on n1"
    job.lose("n1")
    assert job.choose(2).status == status
    # Half of the nodes are no evidence against the user.
    job.lose("n2")
    assert job.choose(2).status == ExitStatus.TRANSIENT


@pytest.mark.parametrize(
    ("check", "status"),
    [
        ("data", ExitStatus.USER_ERROR),
        ("devices", ExitStatus.TRANSIENT),
        ("shared memory", ExitStatus.TRANSIENT),
    ],
)
def test_a_job_of_one_node_is_no_evidence_about_other_nodes(check, status):
    job = Job(("n1",))
    job.reports["n1"] = node_report("n1", findings=[Finding(check, Standing.MEND, "too little")])
    choice = job.choose(1)
    assert (choice.used, choice.status) == ((), status)


def test_a_network_that_fails_only_as_a_whole_stops_the_run(job):
    for node in NODES:
        job.change(node, stage=Stage.ALL_RANKS, fault="timed out", transfers=())
    choice = job.choose(2)
    assert (choice.used, choice.status) == ((), ExitStatus.TRANSIENT)
    assert "the nodes work by pairs but not together: rank 0 (cuda:0): timed out" in choice.reason
    # A node that nobody reaches comes to the end without that check.
    no_traffic(job)
    job.change("n2", stage=Stage.OVER, fault="")
    assert job.choose(2).reason == choice.reason
    assert list(job.told()) == ["n2"]


def test_of_equally_many_versions_those_of_the_first_node_count(job):
    job.nodes = ("n1", "n2")
    job.reports = {"n2": node_report("n2"), "n1": node_report("n1", {"torch": "2.14.0"})}
    assert usual_facts(job.evidence)["torch"] == "2.14.0"


def test_a_fact_that_most_nodes_do_not_have_is_not_missed_there(job):
    job.reports["n3"] = node_report("n3", {"nccl": "2.28"})
    assert job.told() == {"n3": "nccl 2.28, most nodes have none: load the same modules or the same image there"}


CHANGES = (no_report, other_torch, a_rank_that_never_came, late, no_traffic, no_way_to_rank_0)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(CHANGES), st.integers(1, 4))
def test_a_choice_keeps_its_promises(wanted, least, what, unit):
    job = Job()
    what(job)

    def usable(nodes):
        return nodes // unit * unit

    choice = job.choose(max(wanted, least), least, usable)
    assert "n2" not in choice.used
    assert list(choice.used) == [node for node in NODES if node in choice.used]
    if choice.used:
        assert least <= len(choice.used) <= max(wanted, least)
        assert len(choice.used) % unit == 0
        assert choice.status == ExitStatus.FINISHED
    else:
        assert usable(min(max(wanted, least), 3)) < least
        assert choice.status == ExitStatus.TRANSIENT
