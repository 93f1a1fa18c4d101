"""What one rank alone does or meets, and how the others learn of it."""

import json
import time

import pytest
from distributed_runner import run_distributed_test

from vitscale.config import load_config
from vitscale.errors import CheckpointError, ConfigError, ShardError
from vitscale.ranks import groups as process_group
from vitscale.train import saving
from vitscale.train.feed import Feed
from vitscale.train.run import run_training
from vitscale.train.together import on_main

LIMIT_S = 2.0


def _take_long(rank, world_size):
    ranks = process_group.start(timeout_s=LIMIT_S)

    def refuse():
        raise ConfigError("no")

    try:
        found = on_main(ranks, lambda: time.sleep(2.5 * LIMIT_S) or "done")
        with pytest.raises(ConfigError, match=r"^no$") as caught:
            on_main(ranks, refuse)
        return found, caught.value.told
    finally:
        process_group.stop()


def test_rank_0_may_take_longer_than_a_collective_and_only_it_tells_an_error():
    assert run_distributed_test(_take_long, 2, init=False) == [("done", False), ("done", True)]


def _meet_alone(rank, world_size, path, where):
    """Rank 1 alone cannot read a checkpoint, or a sample."""

    def fail(*_):
        raise CheckpointError("rank 1 cannot read") if where == "checkpoint" else ShardError("rank 1 cannot read")

    if rank == 1 and where == "checkpoint":
        saving.read_fragments = fail
    elif rank == 1:
        Feed.take = fail
    try:
        run_training(load_config(path, ["schedule.length=6"]))
    except Exception as error:
        return type(error).__name__, str(error)


def test_a_checkpoint_that_one_rank_cannot_read_ends_all_of_them_with_its_reason(micro_config):
    run_distributed_test(_train, 1, micro_config, init=False)
    outcomes = run_distributed_test(_meet_alone, 2, micro_config, "checkpoint", init=False)
    assert outcomes == [("CheckpointError", "rank 1 cannot read")] * 2


def _train(rank, world_size, path):
    return int(run_training(load_config(path, ["schedule.length=6"])))


def test_the_mistake_that_one_rank_alone_meets_is_the_reason_on_record(micro_config, tmp_path):
    first, second = run_distributed_test(_meet_alone, 2, micro_config, "sample", init=False)
    assert second == ("ShardError", "rank 1 cannot read")
    assert first[0] not in ("ShardError", "NoneType")  # it saw a connection close
    end = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (end["status"], end["reason"]) == (2, "rank 1 cannot read")
