import json
import math
from functools import reduce

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitscale.config import load_config
from vitscale.data.batch import Substitution
from vitscale.engine import StepResult
from vitscale.engine.timing import StepTimes
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import RunningMean, draw_similarity, tags
from vitscale.train.build import draw_blueprint
from vitscale.train.reporting import Reporter

RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))


def result(loss, grad_norm=1.0, norms=None):
    return StepResult(torch.as_tensor(loss), torch.tensor(grad_norm), False, StepTimes([]), norms)


@pytest.fixture
def blueprint(micro_config):
    return draw_blueprint(load_config(micro_config, []), RANKS)


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def averaged(losses):
    """The mean over about 100 steps."""
    return reduce(RunningMean.with_value, losses, RunningMean(100)).value


def test_a_record_tells_of_the_steps_since_the_last(blueprint, run_dir):
    reporter = Reporter(blueprint, RANKS, run_dir, 0)
    reporter.begin()
    norms = {"grad_norm/head": torch.tensor(0.25), "update_norm/blocks.attn": torch.tensor(0.5)}
    last = result(1.0, 0.75, norms)
    for done in (result(3.0), result(2.0), last):
        reporter.step(done, 8)
    assert reporter.train(3, last, 1e-3, images_seen=48, skipped=2, spikes=1) == 1.0
    reporter.close()
    (record,) = records(run_dir)
    assert (record[tags.TRAIN_LOSS], record[tags.TRAIN_LOSS_EMA]) == (1.0, averaged([3.0, 2.0, 1.0]))
    assert (record["grad_norm/head"], record["update_norm/blocks.attn"]) == (0.25, 0.5)
    assert (record[tags.TRAIN_GRAD_NORM], record[tags.TRAIN_LR]) == (0.75, 1e-3)
    assert (record[tags.TRAIN_IMAGES_SEEN], record[tags.TRAIN_EPOCH]) == (48, 48 / blueprint.source.epoch_images)
    assert (record[tags.TRAIN_SKIPPED_STEPS], record[tags.TRAIN_SPIKES], record[tags.DATA_SUBSTITUTIONS]) == (2, 1, 0)
    assert (record[tags.MACHINE_SLOWEST_RANK], record[tags.MACHINE_SLOWEST_RANK_LAG]) == (0, 0)
    assert 50e6 < record[tags.MACHINE_HOST_PEAK_BYTES] < 50e9
    assert record[tags.PERF_IMAGES_PER_S] == pytest.approx(8 / record[tags.PERF_STEP_TIME_S])
    assert record[tags.PERF_OTHER_FRACTION] == 1.0
    # A CPU has no peak to measure by, and no memory of its own.
    assert not {tags.PERF_MFU, tags.PERF_EXECUTED_MFU, tags.MACHINE_DEVICE_PEAK_BYTES} & record.keys()


def test_nothing_of_a_step_is_read_before_the_record(blueprint, run_dir):
    reporter = Reporter(blueprint, RANKS, run_dir, 0)
    # A tensor of the meta device has no value that could be read.
    reporter.step(StepResult(torch.empty((), device="meta"), math.nan, False, None, None), 8)
    reporter.close()


def test_a_loss_that_is_not_finite_is_recorded_and_not_averaged(blueprint, run_dir):
    reporter = Reporter(blueprint, RANKS, run_dir, 0)
    last = result(math.nan)
    for done in (result(2.0), last):
        reporter.step(done, 8)
    assert math.isnan(reporter.train(2, last, 1e-3, images_seen=16))
    reporter.close()
    (record,) = records(run_dir)
    assert (record[tags.TRAIN_LOSS], record[tags.TRAIN_LOSS_EMA]) == (None, pytest.approx(2.0, rel=1e-12))


def test_the_average_goes_on_after_a_resume(blueprint, run_dir):
    losses = [3.0, 2.0, 2.5, 1.0, 0.5]
    for steps in ((1, 2, 3), (4, 5)):
        reporter = Reporter(blueprint, RANKS, run_dir, steps[0] - 1)
        for step in steps:
            done = result(losses[step - 1])
            reporter.step(done, 8)
            reporter.train(step, done, 1e-3, images_seen=8 * step)
        reporter.scalars(steps[-1], {tags.VAL_TOP1: 0.5})  # the last line has no loss
        reporter.close()
    assert [r[tags.TRAIN_LOSS_EMA] for r in records(run_dir) if tags.TRAIN_LOSS_EMA in r][-1] == pytest.approx(
        averaged(losses), rel=1e-6
    )


def test_a_stall_is_the_checkpoint_s_and_a_pause_is_nobody_s(blueprint, run_dir, monkeypatch):
    clock = iter(range(100, 10000))  # a second passes between two looks
    monkeypatch.setattr("vitscale.train.reporting.time.perf_counter", lambda: float(next(clock)))
    reporter = Reporter(blueprint, RANKS, run_dir, 0)
    reporter._meter._clock = lambda: float(next(clock))
    reporter.begin()  # 100
    done = result(1.0)
    reporter.step(done, 8)
    with reporter.stalled():  # 101 to 102
        pass
    with reporter.paused():  # 103 to 104
        pass
    reporter.train(1, done, 1e-3, images_seen=8)  # 105
    reporter.close()
    (record,) = records(run_dir)
    assert record[tags.PERF_PAUSE_S] == 1.0
    assert record[tags.PERF_STEP_TIME_S] == 4.0
    assert record[tags.PERF_CHECKPOINT_FRACTION] == 0.25
    assert record[tags.PERF_IMAGES_PER_S] == 2.0


def test_pictures_and_the_layout_reach_tensorboard(blueprint, run_dir):
    png = draw_similarity(torch.ones(2, 2, 3).numpy())
    reporter = Reporter(blueprint, RANKS, run_dir, 0)
    reporter.images(4, {tags.PICTURE_POS_EMBED: png})
    reporter.close()
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    (event,) = board.Tensors(tags.PICTURE_POS_EMBED)
    assert (event.step, event.tensor_proto.string_val[2]) == (4, png)
    assert board.SummaryMetadata("custom_scalars__config__").plugin_data.plugin_name == "custom_scalars"
    assert records(run_dir) == []


class Batch:
    """What the reporter looks at."""

    class traffic:  # noqa: N801
        read_bytes, used_bytes = 1000, 500

    substitutions = (Substitution(7, "image7", "train-000000.tar", "truncated", "image8"),)


def test_a_replaced_sample_is_named_and_counted(blueprint, run_dir, caplog):
    reporter = Reporter(blueprint, RANKS, run_dir, 0)
    reporter.batch(Batch(), 0.0, 1)
    done = result(1.0)
    reporter.step(done, 8)
    reporter.train(1, done, 1e-3, images_seen=8)
    reporter.close()
    assert records(run_dir)[0][tags.DATA_SUBSTITUTIONS] == 1
    assert "rank 0: sample image7 of train-000000.tar cannot be used (truncated): replaced by image8" in caplog.messages


def test_a_second_sink_that_fails_does_not_end_the_run(micro_config, run_dir, monkeypatch, caplog):
    def gone(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("vitscale.telemetry.second.importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("vitscale.telemetry.second.importlib.import_module", gone)
    blueprint = draw_blueprint(load_config(micro_config, ["log.second_sink=wandb"]), RANKS)
    reporter = Reporter(blueprint, RANKS, run_dir, 0)
    for step in (1, 2, 3):
        done = result(1.0)
        reporter.step(done, 8)
        reporter.train(step, done, 1e-3, images_seen=8 * step)
    reporter.close()
    assert len(records(run_dir)) == 3
    assert [m for m in caplog.messages if "the run goes on without it" in m] == [
        "BackgroundSink failed, the run goes on without it: ConnectionError: no route to host"
    ]
