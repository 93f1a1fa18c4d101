"""What a run of two ranks tells: metrics, pictures and a trace, under ZeRO stage 3, with one rank slower."""

import gzip
import io
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from distributed_runner import run_distributed_test
from engine_cases import CLASSES, IMAGE_PX, build, micro_batches, micro_model, train
from micro_run import micro_tree
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitscale.config import load_config
from vitscale.errors import ExitStatus
from vitscale.telemetry import tags
from vitscale.train.feed import Feed
from vitscale.train.pictures import attention_maps, recorded
from vitscale.train.run import run_training

SLOW_RANK, DELAY_S = 1, 0.25
STEPS = 6
PICTURES = (tags.PICTURE_PREDICTIONS, tags.PICTURE_ATTENTION, tags.PICTURE_POS_EMBED)


def _train(rank, world_size, path, overrides):
    prepare = Feed._on_device

    def slowly(self, batch):
        time.sleep(DELAY_S if rank == SLOW_RANK else 0.0)
        return prepare(self, batch)

    with mock.patch.object(Feed, "_on_device", slowly):
        return int(run_training(load_config(path, overrides)))


@pytest.fixture(scope="module")
def run_dir(digits_dataset, tmp_path_factory):
    """A run of 6 steps in 3 records with 2 validations and a checkpoint, on images of another size for 2 steps."""
    folder = tmp_path_factory.mktemp("telemetry")
    tree = micro_tree(digits_dataset, folder / "run")
    tree["model"]["pool"] = "map"
    tree["log"] = {"every_steps": 2, "pictures": 10}
    path = folder / "micro.yaml"
    path.write_text(yaml.safe_dump(tree))
    overrides = [
        "engine.zero_stage=3",
        f"schedule.length={STEPS}",
        "schedule.phases=[{until: 2, img_size: 24}]",
        "eval.every_steps=4",
        "checkpoint.every_steps=3",
        "profile.steps=3..4",
        "profile.ranks=[1]",
    ]
    assert run_distributed_test(_train, 2, path, overrides, init=False) == [ExitStatus.FINISHED] * 2
    return folder / "run"


def records(run_dir: Path) -> dict[int, dict[str, float]]:
    """Training metrics by step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record for record in lines if tags.TRAIN_LOSS in record}


def test_every_record_has_every_metric(run_dir):
    found = records(run_dir)
    assert list(found) == [2, 4, 6]
    beyond_a_cpu = {tags.PERF_MFU, tags.PERF_EXECUTED_MFU, tags.MACHINE_DEVICE_PEAK_BYTES}
    prefixes = (tags.GRAD_NORM_PARTS, tags.UPDATE_NORM_PARTS, tags.WEIGHT_NORM_PARTS)
    not_here = beyond_a_cpu | {tags.PERF_PAUSE_S} | {*PICTURES} | {*prefixes}
    wanted = {tag for name, tag in vars(tags).items() if name.isupper() and not tag.startswith("val/")} - not_here
    for record in found.values():
        assert wanted <= record.keys()
        for prefix in prefixes:
            assert record[f"{prefix}blocks.attn"] > 0
    assert [record[tags.TRAIN_IMAGES_SEEN] for record in found.values()] == [16, 32, 48]
    assert tags.PERF_PAUSE_S not in found[4]
    assert found[6][tags.PERF_PAUSE_S] > 0  # the validation after step 4


def test_the_parts_of_a_step_make_up_its_time(run_dir):
    for step, record in records(run_dir).items():
        parts = [value for tag, value in record.items() if tag.startswith("perf/") and tag.endswith("_fraction")]
        assert len(parts) == 7
        assert sum(parts) == pytest.approx(1.0, abs=1e-9)
        assert min(parts) >= 0
        for tag in (tags.PERF_FORWARD_FRACTION, tags.PERF_BACKWARD_FRACTION, tags.PERF_COMMUNICATION_FRACTION):
            assert record[tag] > 0.001
        # Step 3 is saved, and step 6 only after its record.
        assert (record[tags.PERF_CHECKPOINT_FRACTION] > 0) == (step == 4)


@pytest.mark.fault(24)
def test_the_slow_rank_is_named(run_dir):
    found = list(records(run_dir).values())[1:]  # the first record has what every rank does once
    assert [record[tags.MACHINE_SLOWEST_RANK] for record in found] == [SLOW_RANK] * 2
    # Two micro-batches a step.
    assert min(record[tags.MACHINE_SLOWEST_RANK_STEP_S] for record in found) >= 2 * DELAY_S
    assert statistics.mean(record[tags.MACHINE_SLOWEST_RANK_LAG] for record in found) > 0.1


def test_pictures_come_with_each_validation(run_dir):
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    for tag in PICTURES:
        events = board.Tensors(tag)
        assert [event.step for event in events] == [4, 6]
        first, last = (event.tensor_proto.string_val[2] for event in events)
        assert first != last, "the model has learned between them"
    sheet = Image.open(io.BytesIO(board.Tensors(tags.PICTURE_PREDICTIONS)[0].tensor_proto.string_val[2]))
    assert sheet.size == (8 * 136 + 8, 2 * 166 + 8)  # ten images


def test_the_trace_is_of_the_rank_and_the_steps_that_were_asked_for(run_dir):
    (path,) = (run_dir / "profile").iterdir()
    assert path.name == "trace-rank1-step3-4.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    # Two steps of two micro-batches: two blocks and the probe, and the blocks once more where they are recomputed.
    assert names.count("aten::scaled_dot_product_attention") == 2 * 2 * (2 + 1 + 2)
    assert names.count("aten::gelu_backward") == 2 * 2 * (2 + 1)


def _look(rank, world_size):
    """What is seen through each engine after a step."""
    seen = []
    for kind, stage in (("torch", 0), ("deepspeed", 2), ("deepspeed", 3)):
        engine = build(kind, stage, rank, world_size)
        train(engine, range(1), rank, world_size)
        images = next(micro_batches(7, 0, 1))[0]
        with recorded(engine.module) as recording:
            # Only rank 0's images are looked at; the others help with the weights.
            logits = engine.predict(images if rank == 0 else torch.zeros(1, 3, IMAGE_PX, IMAGE_PX))
        seen.append((logits.numpy(), recording.attention().numpy(), recording.position_embedding().numpy()))
        train(engine, range(1, 2), rank, world_size)  # goes on as if nobody had looked
    return seen


def test_every_engine_lets_the_same_be_seen():
    (oracle, *others), _ = run_distributed_test(_look, 2)
    assert oracle[0].shape == (4, CLASSES)
    assert oracle[1].shape == (4, 2, 2, 2)
    assert np.abs(oracle[1] - attention_maps(micro_model(), next(micro_batches(7, 0, 1))[0]).numpy()).max() > 0
    for engine in others:
        for tensor, wanted in zip(engine, oracle, strict=True):
            np.testing.assert_allclose(tensor, wanted, rtol=0, atol=2e-5)
