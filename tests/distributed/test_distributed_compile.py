"""Compiled blocks under every ZeRO stage, and what stage 3 gathers."""

from unittest import mock

import pytest
import torch
from distributed_runner import run_distributed_test
from engine_cases import CLASSES, GLOBAL_BATCH, IMAGE_PX, MICRO_BATCH, micro_batches
from torch._dynamo.utils import counters

from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import create_engine
from vitscale.engine.communication import record_communication
from vitscale.losses import classification_loss
from vitscale.model import create_model
from vitscale.optim import parameter_groups

STEPS = 3
PLAIN = {"compile": False, "activation_checkpointing": "none"}
INDUCTOR, NO_CODE = "inductor", "aot_eager"
# What hooks and partitions do to a block shows in its graph, whatever is made of that; so one case makes code of it.
CASES = [
    (0, NO_CODE, {}, {}),
    (1, NO_CODE, {"activation_checkpointing": "every_k", "checkpoint_every": 2}, {}),
    (2, NO_CODE, {"activation_checkpointing": "selective"}, {"drop_path_rate": 0.5}),
    (3, INDUCTOR, {}, {}),
    (3, NO_CODE, {"activation_checkpointing": "full"}, {"drop_path_rate": 0.5, "drop_path_mode": "subset"}),
    (3, NO_CODE, {"activation_checkpointing": "selective"}, {"drop_path_rate": 0.5}),
]


def build(stage, world_size, rank, engine, depth=2, bucket_elements=1000, **model_options):
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224",
        num_classes=CLASSES,
        img_size=IMAGE_PX,
        patch_size=8,
        embed_dim=32,
        depth=depth,
        num_heads=2,
        representation_size=16,
        **model_options,
    )
    # The threshold would leave the small parameters of a micro model whole.
    zero_3 = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return create_engine(
        model,
        torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3),
        classification_loss("softmax", 0.1),
        EngineSection(
            zero_stage=stage,
            precision="fp32",
            bucket_elements=bucket_elements,
            deepspeed_overrides=zero_3,
            **engine,
        ),
        split=BatchSplit(GLOBAL_BATCH, MICRO_BATCH, GLOBAL_BATCH // (MICRO_BATCH * world_size), world_size),
        clip_norm=0.5,
        device=torch.device("cpu"),
        rank=rank,
    )


def train(engine, rank, world_size):
    """Losses, and how often the last step's micro-steps gathered parameters, on average."""
    losses = []
    for step in range(STEPS):
        torch.manual_seed(100 * step + rank)
        with record_communication() as record:
            losses.append(float(engine.train_step(micro_batches(step, rank, world_size), 5e-3).loss))
    gathers = record.by_kind["all_gather"].calls if "all_gather" in record.by_kind else 0
    return losses, gathers / (GLOBAL_BATCH // (MICRO_BATCH * world_size))


def _compiled_and_plain(rank, world_size, cases):
    outcomes = []
    make = torch.compile
    for stage, backend, engine, options in cases:
        plain, plain_gathers = train(build(stage, world_size, rank, PLAIN, **options), rank, world_size)
        torch._dynamo.reset()
        counters.clear()
        with mock.patch.object(torch, "compile", lambda run, **keys: make(run, **{**keys, "backend": backend})):  # noqa: B023
            engine = build(stage, world_size, rank, {"compile": True, **engine}, **options)
        compiled, gathers = train(engine, rank, world_size)
        graphs = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
        outcomes.append((plain, compiled, plain_gathers, gathers, graphs))
    return outcomes


ONE_A_STAGE = (CASES[0], CASES[1], CASES[2], CASES[4])


@pytest.mark.parametrize("cases", [ONE_A_STAGE, pytest.param(CASES, marks=pytest.mark.slow)], ids=["stages", "all"])
def test_compiled_blocks_train_as_plain_ones_do_at_every_stage_without_a_graph_break(cases):
    for outcomes in run_distributed_test(_compiled_and_plain, 2, cases, timeout_s=290):
        for (stage, _, engine, options), (plain, compiled, plain_gathers, gathers, graphs) in zip(
            cases, outcomes, strict=True
        ):
            assert compiled == pytest.approx(plain, rel=1e-5), (stage, engine)
            assert plain[-1] < plain[0], "the step itself has to do something"
            # One for both blocks, or one more where drop path or every_k takes the second one alone.
            assert graphs == (2 if options or "checkpoint_every" in engine else 1, {}), (stage, engine)
            assert gathers == plain_gathers, (stage, engine)


def _gathers_by_depth(rank, world_size):
    """With buckets too small to gather ahead for two blocks at once."""
    return {
        (recompute, depth): train(
            build(3, world_size, rank, {"activation_checkpointing": recompute}, depth=depth), rank, world_size
        )[1]
        for recompute in ("none", "full")
        for depth in (2, 4)
    }


def test_stage_3_gathers_once_for_a_block_and_direction():
    for gathers in run_distributed_test(_gathers_by_depth, 2):
        for recompute in ("none", "full"):
            assert gathers[recompute, 4] - gathers[recompute, 2] == 2 * 2, gathers
