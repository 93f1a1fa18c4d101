"""launch/job_request.py: times and amounts as Slurm writes them, whose word counts, and every refusal."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from job_request import JobRequest, draw_request, flag, read_defaults, time_limit_min

from vitscale.errors import ConfigError, LaunchError

below_60 = st.integers(0, 59)


@given(st.integers(0, 30), st.integers(0, 23), below_60, below_60)
def test_every_format_of_a_time_says_the_same(days, hours, minutes, seconds):
    total_s = 86400 * days + 3600 * hours + 60 * minutes + seconds
    expected = -(-total_s // 60)
    texts = [f"{days}-{hours:02}:{minutes:02}:{seconds:02}", f"{24 * days + hours}:{minutes:02}:{seconds:02}"]
    texts += [f"{total_s // 60}:{seconds:02}"]
    texts += [f"{days}-{hours}:{minutes}", str(total_s // 60)] if seconds == 0 else []
    texts += [f"{days}-{hours}"] if seconds == minutes == 0 else []
    for text in texts:
        if expected:
            assert time_limit_min(text) == expected, text
        else:
            with pytest.raises(ValueError, match="is no time to train in"):
                time_limit_min(text)


@pytest.mark.parametrize("text", ["", "1h", "1-", "1:2:3:4", "1-2:3:4:5", "-5", "1.5", "UNLIMITED", "10:60", "1:99:00"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="is no time"):
        time_limit_min(text)


def request(flags=None, cluster=None, tmp_path=Path("/nowhere")):
    return draw_request(flags or {}, cluster, clusters=tmp_path, site_file=tmp_path / "site.yaml")


def test_what_is_built_in():
    assert request() == JobRequest()
    assert (request().ranks_per_node, request().most_nodes, request().fewest_nodes) == (1, 1, 1)


def test_a_flag_counts_more_than_the_clusters_file_and_that_more_than_the_sites(tmp_path):
    (tmp_path / "site.yaml").write_text("partition: site\naccount: site\nqos: site\nenv_setup: [module load a]\n")
    (tmp_path / "big.yaml").write_text("partition: big\naccount: big\ngpus_per_node: 4\n")
    found = request({"partition": "flag", "nodes": "3", "spare_nodes": "1"}, "big", tmp_path)
    assert (found.partition, found.account, found.qos) == ("flag", "big", "site")
    assert found.env_setup == ("module load a",)
    assert (found.nodes, found.most_nodes, found.ranks_per_node) == (3, 4, 4)


def test_a_time_in_a_file_needs_no_quotes(tmp_path):
    # To YAML 1.1 this is the number 5400.
    (tmp_path / "site.yaml").write_text("time: 1:30:00\nnodes: 4\npreflight: no\nhbm_gb: 80\n")
    assert read_defaults(tmp_path / "site.yaml") == {
        "time": "1:30:00",
        "nodes": 4,
        "preflight": False,
        "hbm_gb": 80,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: x", r"site.yaml: unknown key partitoin: did you mean partition\?"),
        ("nodes: none", "site.yaml: nodes: .*valid integer"),
        ("time: 1h", "site.yaml: time: is no time: write minutes"),
        ("mem: 200\nmem: 300", "site.yaml: not valid YAML: key 'mem' is given twice"),
        ("- nodes", "site.yaml: a config is a mapping"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        request(tmp_path=tmp_path)


def test_a_cluster_that_nobody_knows(tmp_path):
    (tmp_path / "big.yaml").touch()
    (tmp_path / "old.yaml").touch()
    with pytest.raises(LaunchError, match=r"--cluster bgi: no .*/bgi.yaml; there are: big, old"):
        request({}, "bgi", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"time": "1h"}, r"--time 1h is no time: write minutes \(90\), H:MM:SS \(1:30:00\) or D-HH:MM \(2-12:00\)"),
        ({"mem": "200"}, "--mem 200 is no amount of memory: write a whole number and its unit, such as 200GB"),
        ({"nodes": "0"}, "--nodes 0: Input should be greater than or equal to 1"),
        ({"signal_delay_s": "soon"}, "--signal-delay soon: Input should be a valid integer"),
        ({"hbm_gb": "-1"}, "--hbm -1: Input should be greater than 0"),
        ({"env_setup": ["a\nb"]}, r"--env-setup a\nb: String should match"),
        (
            {"gpus_per_node": "8", "tasks_per_node": "2"},
            "--gpus-per-node 8 with --tasks-per-node 2: a rank uses one GPU",
        ),
        ({"nodes": "2", "min_nodes": "3"}, "--min-nodes 3 is more than --nodes 2: swap the two"),
        ({"spare_nodes": "1", "preflight": False}, "--no-preflight with --min-nodes or --spare-nodes: the preflight"),
        ({"nodes": "2", "min_nodes": "1", "preflight": False}, "--no-preflight with --min-nodes or --spare-nodes"),
        (
            {"signal_delay_s": "60"},
            "--signal-delay 60: 60 s before its limit the job is requeued as it is, give the ranks",
        ),
        ({"time": "5", "signal_delay_s": "300"}, "--signal-delay 300 is no less than --time 5: the job would be told"),
    ],
)
def test_mistakes_of_the_command_line(flags, message):
    with pytest.raises(LaunchError, match=message):
        request(flags)


def test_units_stand_in_the_help_and_not_in_the_flag():
    assert [flag(name) for name in ("signal_delay_s", "hbm_gb", "tasks_per_node")] == [
        "--signal-delay",
        "--hbm",
        "--tasks-per-node",
    ]
    assert "Seconds" in (JobRequest.model_fields["signal_delay_s"].description or "")
