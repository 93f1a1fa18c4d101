"""One run's life on a real cluster, and what it comes to: the losses and samples of a run that was left alone."""

import time
from collections.abc import Iterator

import pytest
from cluster import Cluster, started_cluster
from submitted_run import SubmittedRun, assert_as_if_alone, undisturbed, write_config

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS, EVERY = 400, 10


@pytest.fixture
def three_nodes() -> Iterator[Cluster]:
    with started_cluster(nodes=3) as cluster:
        yield cluster


@pytest.fixture
def run(three_nodes, digits_dataset, tmp_path) -> SubmittedRun:
    """A run that has done its first steps."""
    write_config(tmp_path, digits_dataset, STEPS, EVERY)
    run = SubmittedRun(three_nodes, tmp_path)
    run.wait(lambda: run.steps >= 3)
    return run


@pytest.mark.fault(16, 21, 22)
def test_a_run_outlives_what_befalls_a_cluster(three_nodes, run, tmp_path):
    # The controller restarts: the job does not notice.
    three_nodes.restart_controller()
    seen = run.steps
    run.wait(lambda: run.steps > seen)
    assert (run.job["JobState"], run.job["Restarts"]) == ("RUNNING", "0")

    # A job of a higher partition wants the nodes: a checkpoint within the grace, and the run is back afterwards.
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null"]
    asked_s = time.monotonic()
    urgent_id = three_nodes.run([*urgent, "--wrap=sleep 1"]).stdout.strip()
    run.wait(lambda: "stopped at step" in run.log)  # ranks that outlive the grace are killed before they say so
    committed_s = time.monotonic() - asked_s
    stopped = run.saved_step
    three_nodes.wait_for_job(urgent_id, ["COMPLETED"], limit_s=120)
    back_s = run.wait_for_start(1)
    assert f"goes on from {run.run_dir}/checkpoints/step-{stopped:08d}" in run.log

    # A node loses its power: the run goes on with the third.
    lost = run.nodes()[1]
    three_nodes.kill_node(lost)
    killed_s = time.monotonic()
    with undisturbed(tmp_path) as alone:
        run.wait_for_start(2)
        lost_s = time.monotonic() - killed_s
        assert lost not in run.nodes()
        three_nodes.wait_for_job(run.job_id, ["COMPLETED"], limit_s=240)
    assert_as_if_alone(run.run_dir, alone, STEPS)
    print(f"committed {committed_s:.1f} s after the request, back {back_s:.1f} s, without the lost node {lost_s:.1f} s")


@pytest.mark.slow
@pytest.mark.fault(15, 21)
def test_ranks_that_live_on_behind_a_cut_cable_count_for_nothing(three_nodes, run, tmp_path):
    for restart, which in ((1, 1), (2, 0)):  # the second node of the job, then the one with rank 0 and the batch script
        cut = run.nodes()[which]
        three_nodes.cut(cut)
        run.wait_for_start(restart)
        assert cut not in run.nodes()
        three_nodes.plug_in_again(cut)
    with undisturbed(tmp_path) as alone:
        three_nodes.wait_for_job(run.job_id, ["COMPLETED"], limit_s=240)
    assert_as_if_alone(run.run_dir, alone, STEPS)
