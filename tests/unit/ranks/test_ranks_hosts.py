"""Slurm's short forms: what `scontrol show hostnames` prints, where it is installed, and what it printed once."""

import itertools
import os
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.errors import LaunchError
from vitscale.ranks.hosts import expand_counts, expand_hosts

# scontrol reads a configuration before it does anything.
SLURM_CONF = "ClusterName=x\nSlurmctldHost=localhost\nNodeName=localhost\n"


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("vsn1", "vsn1"),
        ("gpu4,vsn[1-2]", "gpu4 vsn1 vsn2"),
        ("node[01-03,7],gpu4", "node01 node02 node03 node7 gpu4"),
        ("rack[1-2]n[01-03,7],gpu4", "rack1n01 rack1n02 rack1n03 rack1n7 rack2n01 rack2n02 rack2n03 rack2n7 gpu4"),
        ("n[9-11]m[099-101]", "n9m099 n9m100 n9m101 n10m099 n10m100 n10m101 n11m099 n11m100 n11m101"),
        ("a[1-2]b[3-4]c[5-6]", "a1b3c5 a1b3c6 a2b3c5 a2b3c6 a1b4c5 a1b4c6 a2b4c5 a2b4c6"),
        ("n[1-03,001-1]", "n1 n2 n3 n001"),
        ("n[1,1],n1", "n1 n1 n1"),
        ("10.0.0.[1-2],fd00::[1-2]", "10.0.0.1 10.0.0.2 fd00::1 fd00::2"),
    ],
)
def test_what_scontrol_prints(nodelist, hosts):
    assert expand_hosts(nodelist) == hosts.split()


def test_a_bracket_in_the_middle():
    # Later Slurm writes such lists, which the scontrol of 22.05 refuses to read.
    assert expand_hosts("a-b[7-8]-ib,c") == ["a-b7-ib", "a-b8-ib", "c"]


@pytest.mark.parametrize("nodelist", ["", "n[", "n]", "n[]", "n[3-1]", "n[a]", "n[1,,2]", "n[1-2-3]", "a,,b", "a b"])
def test_what_is_no_list(nodelist):
    with pytest.raises(LaunchError, match=r"SLURM_STEP_NODELIST='.*' is no list of hosts such as node\[01-03"):
        expand_hosts(nodelist)


NAME = st.from_regex(r"[a-z][a-z.-]{0,3}", fullmatch=True)
FROM_TO = st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(1, 4))
RANGE = FROM_TO.map(lambda parts: f"{parts[0]:0{parts[2]}d}" + (f"-{parts[0] + parts[1]}" if parts[1] else ""))
BRACKET = st.lists(RANGE, min_size=1, max_size=3).map(lambda ranges: f"[{','.join(ranges)}]")
ITEM = st.lists(st.tuples(NAME, BRACKET), min_size=1, max_size=4).map(lambda parts: "".join(itertools.chain(*parts)))
NODELIST = st.lists(NAME | ITEM, min_size=1, max_size=3).map(",".join)


@pytest.fixture(scope="module")
def scontrol(tmp_path_factory):
    if shutil.which("scontrol") is None:
        pytest.skip("no scontrol: apt-get install slurm-client")
    conf = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    conf.write_text(SLURM_CONF)

    def hostnames(nodelist):
        command = ["scontrol", "show", "hostnames", nodelist]
        done = subprocess.run(command, env={**os.environ, "SLURM_CONF": str(conf)}, capture_output=True, check=True)
        return done.stdout.decode().split()

    return hostnames


@settings(max_examples=40)
@given(nodelist=NODELIST)
def test_every_list_is_read_as_scontrol_reads_it(scontrol, nodelist):
    assert expand_hosts(nodelist) == scontrol(nodelist)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_counts_in_the_short_form(counts):
    groups = [(count, len(list(group))) for count, group in itertools.groupby(counts)]
    short = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in groups)
    assert expand_counts(short) == counts


@pytest.mark.parametrize("text", ["two", "", "2(x3", "2,"])
def test_what_is_no_count(text):
    with pytest.raises(LaunchError, match=r"SLURM_STEP_TASKS_PER_NODE='.*' is no task count: start .* with srun"):
        expand_counts(text)
