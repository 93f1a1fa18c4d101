"""Models that are built partitioned from the start, by DeepSpeed's `zero.Init`, are the models built whole."""

import deepspeed
import pytest
import torch
from distributed_runner import run_distributed_test

from vitscale.config import BatchSplit, EngineSection, OptimSection
from vitscale.engine import create_engine, render_deepspeed_config
from vitscale.losses import classification_loss
from vitscale.model import create_model
from vitscale.optim import build_optimizer

SHAPE = {"num_classes": 5, "img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
OPTIONS = {
    "plain": {"representation_size": 16},
    "map": {"pool": "map", "layer_scale": 0.1, "qk_norm": True, "reg_tokens": 2},
    "parallel": {"pool": "avg", "parallel": True, "act": "swiglu", "norm_bias": False, "qkv_bias": False},
    "distilled": {"distilled": True, "weight_init": "trunc_normal"},
    "hybrid": {"stem": (1,), "patch_size": 2, "weight_init": "jax_nlhb"},
}
WORLD = 2
ENGINE = EngineSection(kind="deepspeed", zero_stage=3, precision="fp32", bucket_elements=1000)
SPLIT = BatchSplit(global_batch=8, micro_batch=4, grad_accum=1, world_size=WORLD)


def _model(options):
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", **{**SHAPE, **options})


def _engine(model, kind, world_size, rank):
    return create_engine(
        model,
        build_optimizer(model, OptimSection(peak_lr=1e-3)),
        classification_loss("softmax", 0.0),
        ENGINE.model_copy(update={"kind": kind}),
        split=BatchSplit(8, 8 // world_size, 1, world_size),
        clip_norm=1.0,
        device=torch.device("cpu"),
        rank=rank,
    )


def _batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(5, (8,), generator=generator)


def _build_partitioned(rank, world_size):
    deepspeed.init_distributed("gloo")  # DeepSpeed asks its own module, not torch, whether ranks have met
    rendered = render_deepspeed_config(ENGINE, SPLIT, 1.0, "fp32")
    images, labels = _batch()
    mine = slice(rank, None, world_size)
    found = {}
    for name, options in OPTIONS.items():
        with deepspeed.zero.Init(config_dict_or_path=rendered):
            model = _model(options)
        held = sum(parameter.numel() for parameter in model.parameters())
        weights = {}
        for key, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter):
                weights[key] = parameter.detach().clone()
        engine = _engine(model, "deepspeed", world_size, rank)
        losses = [float(engine.train_step([(images[mine], labels[mine])], 1e-3).loss) for _ in range(3)]
        found[name] = weights, held, losses
    return found


def test_partitioned_construction_gives_the_same_weights_and_the_same_training():
    by_rank = run_distributed_test(_build_partitioned, WORLD)
    for name, options in OPTIONS.items():
        whole = _model(options)
        expected = dict(whole.named_parameters())
        weights, held, _ = by_rank[0][name]
        assert held == 0, "a parameter stayed whole"
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            assert torch.equal(value, expected[key]), (name, key)
        oracle = _engine(whole, "torch", 1, 0)
        alone = [float(oracle.train_step([_batch()], 1e-3).loss) for _ in range(3)]
        mean = [(a + b) / 2 for a, b in zip(by_rank[0][name][2], by_rank[1][name][2], strict=True)]
        assert mean == pytest.approx(alone, rel=1e-5), name
