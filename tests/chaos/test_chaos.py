"""Runs that are killed, stopped and damaged at random go on as if nothing had been."""

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import yaml
from chaos_driver import SAVE_PHASES, SAVED_EVERY, ChaosRun, started_ranks
from micro_run import losses, micro_tree

from vitscale.train.ledger import read_ledger

TOTAL_STEPS = 42
SHARED_MEMORY = Path("/dev/shm")


def write_config(folder: Path, dataset: Path, *, dropout: bool) -> Path:
    """A run of 42 steps that is saved every 3, whose watchdog is quick."""
    tree = micro_tree(dataset, folder / "run")
    tree["schedule"]["length"] = TOTAL_STEPS
    tree["checkpoint"] = {"every_steps": SAVED_EVERY, "keep_last": 3}
    tree["batch"] = {"global_batch": 24, "micro_batch": 6 if dropout else 2}  # 2 divides the share of 3 ranks and of 4
    tree["watchdog"] = {"step_s": 10, "data_s": 9, "save_s": 30, "beat_s": 0.5, "answer_s": 2}
    if not dropout:  # its masks depend on the ranks, and a high rate makes rounding in another order grow
        tree["model"] |= {"drop_rate": 0.0, "drop_path_rate": 0.0}
        tree["optim"] = {"peak_lr": 3e-4}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def leftovers(chaos: ChaosRun) -> set[str]:
    """Shared memory with a name of the dead ranks, and processes of their sessions."""
    marks = [*(f"_{pid}_" for pid in chaos.dead), *(f"_{port}_" for port in chaos.ports)]
    found = {path.name for path in SHARED_MEMORY.glob("*") if any(mark in path.name for mark in marks)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) in chaos.dead and process.status() != psutil.STATUS_ZOMBIE:
                found.add(f"{process.pid} {' '.join(process.cmdline())}")
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits_dataset) -> Callable[[bool], Path]:
    """The same run that nobody disturbs, on 2 ranks at stage 2, with dropout or without; gives its directory."""

    @cache
    def run(dropout: bool) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        config, log = write_config(folder, digits_dataset, dropout=dropout), folder / "life.log"
        with started_ranks(2, ["train", str(config)], log, (0, "", 0)) as processes:
            for process in processes:
                process.join()
            assert [process.exitcode for process in processes] == [0, 0], log.read_text()
        return folder / "run"

    return run


def assert_unlocked(run_dir: Path) -> None:
    """That a new start could take the run directory."""
    with (run_dir / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def torment(
    folder: Path,
    dataset: Path,
    whole: Path,
    seed: int,
    most_lives: int,
    phases: Sequence[str] = (),
    *,
    same_topology: bool = True,
) -> ChaosRun:
    """Lead a run through its lives and compare it with the undisturbed one."""
    config = write_config(folder, dataset, dropout=same_topology)
    chaos = ChaosRun(config, folder / "run", seed, TOTAL_STEPS, same_topology=same_topology)
    chaos.go(most_lives, phases)
    assert leftovers(chaos) == set()
    assert_unlocked(folder / "run")
    assert read_ledger(folder / "run").keys() == set(range(1, TOTAL_STEPS + 1)), chaos.story()
    seen = {step: sorted(keys) for step, keys in read_ledger(folder / "run").items()}
    assert seen == {step: sorted(keys) for step, keys in read_ledger(whole).items()}, chaos.story()
    expected, found = losses(whole), losses(folder / "run")
    assert found.keys() == expected.keys()
    if same_topology:
        assert found == expected, chaos.story()
    else:
        assert found == pytest.approx(expected, rel=1e-5), chaos.story()
    return chaos


@pytest.mark.fault(1, 7, 8, 9, 11, 12, 23)
@pytest.mark.parametrize(
    "same_topology",
    [pytest.param(True, marks=pytest.mark.slow, id="one topology"), pytest.param(False, id="any topology")],
)
def test_a_tormented_run_ends_as_if_it_had_been_left_alone(tmp_path, digits_dataset, undisturbed, same_topology):
    whole = undisturbed(same_topology)
    chaos = torment(tmp_path, digits_dataset, whole, seed=7, most_lives=4, same_topology=same_topology)
    assert len(chaos.lives) >= 3


@pytest.mark.fault(2, 3, 4, 5)
def test_a_rank_killed_in_any_phase_of_a_save_costs_no_more_than_that_save(tmp_path, digits_dataset, undisturbed):
    most_lives = len(SAVE_PHASES) + 1
    chaos = torment(tmp_path, digits_dataset, undisturbed(True), 3, most_lives, SAVE_PHASES)
    killed = [life for life in chaos.lives if life.phase]
    assert [life.phase for life in killed] == list(SAVE_PHASES)
    assert all(-signal.SIGKILL in life.statuses for life in killed)
    # Each life commits one save and is killed in the next, which counts from the renaming on, or where the others
    # did not need the killed rank any more.
    steps = [life.expected_step for life in chaos.lives]
    won = dict(zip(SAVE_PHASES, (after - before for before, after in pairwise(steps)), strict=True))
    assert won.pop("record left") in (3, 6)
    assert won == {phase: 6 if phase in ("renamed", "pruning") else 3 for phase in won}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("same_topology", [True, False], ids=["one topology", "any topology"])
@pytest.mark.fault(1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 16, 23)
def test_hundreds_of_blows_lose_nothing(tmp_path, digits_dataset, undisturbed, same_topology):
    whole = undisturbed(same_topology)
    kills = seed = 0
    while kills < 100:
        chaos = torment(tmp_path / f"{seed}", digits_dataset, whole, seed, most_lives=30, same_topology=same_topology)
        kills, seed = kills + chaos.kills, seed + 1
        print(f"seed {seed}: {kills} kills so far, {len(chaos.lives)} lives, {chaos.damages} with damage")
