"""Checkpoints that DeepSpeed itself writes, at every stage: what is imported is what its engine held."""

import itertools
import json
import random
import shutil
from argparse import Namespace
from pathlib import Path
from unittest import mock

import deepspeed
import numpy as np
import pytest
import torch
import yaml
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from distributed_runner import run_distributed_test
from engine_cases import CLASSES, build, manifest_of, micro_batches, micro_model, save, train
from micro_run import micro_tree
from storage_meter import StorageMeter

from vitscale.checkpoint import Hints, locate, read_portable, stored_weights
from vitscale.checkpoint.deepspeed_files import MOMENTS, locate_tag, read_deepspeed
from vitscale.cli.main import main
from vitscale.config import load_config
from vitscale.engine import MASTER
from vitscale.engine.zero_state import zero_flats, zero_fragments
from vitscale.errors import VitscaleError
from vitscale.train.adoption import adopt_deepspeed
from vitscale.train.run import run_training
from vitscale.train.saving import Saver

MODEL = Hints("vit_tiny_patch16_224", {"num_heads": 2, "patch_size": 8, "img_size": 16, "embed_dim": 32, "depth": 2})
STEPS, MICRO_BATCH = 2, 12
VALUES = (MASTER, *MOMENTS)
# What training scripts keep beside the weights: read without executing any of it.
CLIENT_STATE = {
    "args": Namespace(lr=1e-3, out=Path("runs/a")),
    "rng": {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
    "best": np.float64(0.5),
}
CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in range(4) if stage or precision == "fp32"]


def _save_all(rank, world_size, folder):
    for stage, precision in CASES:
        name = f"stage{stage}-{precision}"
        engine = build("deepspeed", stage, rank, world_size, precision=precision, micro_batch=MICRO_BATCH)
        train(engine, range(STEPS), rank, world_size, MICRO_BATCH)
        save(engine, folder / "ours" / name, rank)
        engine._engine.save_checkpoint(folder / name, client_state=CLIENT_STATE)
    if world_size == 1:
        return {}
    return {name: _save_raw(rank, world_size, folder / name, *case) for name, case in RAW.items()}


def _raw_config(world_size, stage, **changes):
    return {
        "train_batch_size": 4 * world_size, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True}, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **changes,
    }  # fmt: skip


def _freeze_and_tie(model):
    model.patch_embed.requires_grad_(False)
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight


PURE_BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
# Ways to run DeepSpeed that are not ours: stage, changes of its config, of the model.
RAW = {
    "ddp-bf16": (0, {"data_types": {"grad_accum_dtype": "bf16"}}, None),
    "bf16-optimizer": (1, {"data_types": {"grad_accum_dtype": "fp32"}}, None),
    "bf16-masters-2": (2, {"bf16": PURE_BF16}, None),
    "bf16-masters-3": (3, {"bf16": PURE_BF16}, None),
    "round-robin": (2, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, None),
    "elastic": (1, {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, None),
    "offload-2": (2, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, None),
    "offload-3": (3, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, None),
    "sub-groups": (3, {"zero_optimization": {"stage": 3, "sub_group_size": 3000}}, None),
    "frozen-1": (1, {}, _freeze_and_tie),
    "frozen-2": (2, {}, _freeze_and_tie),
    "frozen-3": (3, {}, _freeze_and_tie),
}


def _save_raw(rank, world_size, folder, stage, changes, prepare):
    model = micro_model()
    if prepare is not None:
        prepare(model)
    kinds = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kinds[parameter.ndim > 1].append(parameter)
    groups = [{"params": kinds[True], "weight_decay": 0.1}, {"params": kinds[False], "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, 1e-2), config=_raw_config(world_size, stage, **changes),
        dist_init_required=False,
    )  # fmt: skip
    images, labels = next(micro_batches(0, rank, world_size))
    engine.backward(torch.nn.functional.cross_entropy(engine(images.bfloat16()).float(), labels))
    engine.step()
    engine.save_checkpoint(folder)
    weights = {name: _held(engine, parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    # Our adapter knows neither of the two that have no ZeRO stage of their own.
    known = not isinstance(engine.optimizer, (BF16_Optimizer, FP16_UnfusedOptimizer))
    return weights, _moments(engine) if known else {}


def _held(engine, parameter):
    """The fp32 weights of a parameter as the engine has them."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        chain = itertools.chain.from_iterable
        pairs = zip(chain(optimizer.fp16_groups), chain(optimizer.fp32_groups), strict=True)
        return next(master.detach().clone() for low, master in pairs if low is parameter)
    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return safe_get_full_fp32_param(parameter).detach().float().clone()


def _moments(engine):
    """Adam's moments by key and name, put together from all ranks by our own adapter to DeepSpeed's insides."""
    mine = [
        (fragment.name, fragment.offset, {key: fragment.values[key].float() for key in MOMENTS})
        for fragment in zero_fragments(engine, zero_flats(engine))
    ]
    of_ranks = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, mine)
    runs = sorted(itertools.chain.from_iterable(of_ranks), key=lambda run: run[:2])
    return {
        key: {
            name: torch.cat([values[key] for _, _, values in group])
            for name, group in ((name, list(group)) for name, group in itertools.groupby(runs, key=lambda run: run[0]))
        }
        for key in MOMENTS
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """For each world size: the folder of all checkpoints, and what the engine held of those without ours beside."""
    found = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        (folder / "ours").mkdir()
        found[world_size] = folder, run_distributed_test(_save_all, world_size, folder, timeout_s=240)[0]
    return found


def _equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_the_imported_weights_are_the_engines_fp32_ones(written, world_size, stage, precision):
    folder, _ = written[world_size]
    name = f"stage{stage}-{precision}"
    model = read_portable(folder / name, hints=MODEL)
    _equal({name: model.checked(name) for name in model.shapes}, _ours(folder, name, world_size))
    assert model.variant.num_classes == CLASSES
    assert model.trained == {"source": f"{name}/global_step{STEPS}", "step": STEPS}
    assert model.origin.path == f"{name}/global_step{STEPS}"


def _ours(folder, name, world_size, value="master"):
    """What our own portable state says of the same engine at the same step."""
    return stored_weights(folder / "ours" / name, manifest_of(world_size, STEPS), value)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), [case for case in CASES if case[0]])
def test_the_moments_are_the_optimizers(written, world_size, stage, precision):
    folder, _ = written[world_size]
    name = f"stage{stage}-{precision}"
    contents = read_deepspeed(folder / name)
    assert tuple(contents.moments) == MOMENTS
    for key in MOMENTS:
        expected = _ours(folder, name, world_size, key)
        _equal({name: make() for name, make in contents.moments[key].items()}, expected)
        assert any(value.any() for value in expected.values())
    assert contents.optimizer_steps == STEPS


@pytest.mark.parametrize("name", RAW)
def test_other_ways_to_run_deepspeed_are_read_too(written, name):
    folder, held = written[2]
    weights, moments = held[name]
    model = read_portable(folder / name, hints=MODEL)
    _equal({name: model.checked(name) for name in model.shapes}, weights)
    rounded = all(torch.equal(value.bfloat16().float(), value) for value in weights.values())
    assert rounded == name.startswith("bf16-masters"), "the weights must be fp32 ones that bf16 cannot hold"
    found = read_deepspeed(folder / name).moments
    for key in moments:
        _equal({name: make().flatten() for name, make in found[key].items()}, moments[key])
    assert bool(found) == (name != "ddp-bf16"), "no name leads to them there"


UNIVERSAL = [f"stage{stage}-{precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


def _universal(folder, tag):
    """What DeepSpeed's own converter makes of a tag."""
    out = folder / f"{tag}_universal"
    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / tag), output_folder=str(out), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip
    return out


@pytest.mark.parametrize("name", UNIVERSAL)
def test_a_universal_checkpoint_holds_the_same(written, name):
    folder, _ = written[2]
    path = _universal(folder / name, f"global_step{STEPS}")
    model = read_portable(path, hints=MODEL)
    _equal({name: model.checked(name) for name in model.shapes}, _ours(folder, name, 2))
    contents = read_deepspeed(path)
    for key in MOMENTS:
        _equal({name: make() for name, make in contents.moments[key].items()}, _ours(folder, name, 2, key))
    assert (folder / name / "latest_universal").read_text() == path.name


def test_the_converters_own_pointer_is_followed(written, tmp_path):
    folder, _ = written[2]
    shutil.copytree(folder / "stage1-fp32", tmp_path / "run")
    path = _universal(tmp_path / "run", f"global_step{STEPS}")
    assert locate_tag(tmp_path / "run").name == f"global_step{STEPS}"
    (tmp_path / "run" / "latest").unlink()
    assert locate_tag(tmp_path / "run") == path


@pytest.mark.parametrize("name", ["frozen-2", "frozen-3"])
def test_a_universal_checkpoint_of_a_partly_frozen_model_is_read_whole(written, name):
    folder, held = written[2]
    model = read_portable(_universal(folder / name, "global_step1"), hints=MODEL)
    _equal({name: model.checked(name) for name in model.shapes}, held[name][0])


@pytest.mark.parametrize("name", ["stage0-fp32", "stage2-bf16", "stage3-fp32"])
def test_an_import_holds_one_parameter_in_memory(written, name):
    folder, _ = written[2]
    with StorageMeter() as meter:
        model = read_portable(folder / name, hints=MODEL)
        sizes = {name: model.checked(name).nbytes for name in model.shapes}
    largest = max(sizes.values())
    assert largest < sum(sizes.values()) / 4
    assert largest <= meter.peak <= 3 * largest  # its runs, and these joined


def _train(rank, world_size, path, overrides, native=None):
    """A run; with `native`, DeepSpeed saves its own checkpoint there whenever the run saves one of ours."""
    save_ours = Saver.save

    def save_both(saver, progress, *rest):
        if native is not None:
            saver.engine._engine.save_checkpoint(native, tag=f"global_step{progress.step}")
        save_ours(saver, progress, *rest)

    with mock.patch.object(Saver, "save", save_both):
        return run_training(load_config(path, overrides))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_dataset):
    """A run of 12 steps on two ranks that saved after 5, 10 and 12, and DeepSpeed with it."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "micro.yaml"
    config.write_text(yaml.safe_dump(micro_tree(digits_dataset, folder / "whole")))
    run_distributed_test(_train, 2, config, ["checkpoint.keep_last=5"], folder / "native", init=False)
    return folder, config


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def test_a_run_goes_on_from_deepspeeds_training_state_bitwise(trained, tmp_path, capsys):
    folder, config = trained
    words = ["import", folder / "native" / "global_step5", "--training", config, "--out", tmp_path / "adopted"]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert ended.value.code == 0
    assert f"go on from it with run.branch_from={tmp_path / 'adopted'}" in capsys.readouterr().out

    (adopted, theirs), (ours, own) = (
        locate(tmp_path / "adopted"),
        locate(folder / "whole" / "checkpoints/step-00000005"),
    )
    for value in VALUES:
        _equal(stored_weights(adopted, theirs, value), stored_weights(ours, own, value))
    for field in ("step", "optimizer_steps", "cursor", "model", "labels", "shapes"):
        assert getattr(theirs, field) == getattr(own, field), field

    branch = [f"run.branch_from={tmp_path / 'adopted'}", f"run.dir={tmp_path / 'branch'}"]
    run_distributed_test(_train, 2, config, branch, init=False)
    assert _losses(tmp_path / "branch") == {step: loss for step, loss in _losses(folder / "whole").items() if step > 5}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "model.depth=3",
            "blocks.2.norm1.weight [32] is missing: the config is of another model, or the opt",
        ),
        (
            "model.embed_dim=16",
            "cls_token has shape [1, 1, 32], the model wants [1, 1, 16]: the config is of ",
        ),
        (
            "schedule.length=10",
            "global_step10 is of step 10, the run that the config describes ends with step 10",
        ),
        ("optim.kind=sgd", "optim.kind=sgd: DeepSpeed's moments are Adam's: set optim.kind=adamw"),
    ],
)
def test_a_training_state_that_the_config_cannot_take(trained, tmp_path, override, said):
    folder, config = trained
    with pytest.raises(VitscaleError) as caught:
        adopt_deepspeed(folder / "native" / "global_step10", load_config(config, [override]), tmp_path / "adopted")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "adopted").exists()
