"""Bytes of a tag as planned, and as an engine has them to save."""

from pathlib import Path

import pytest
import torch
from micro_run import micro_tree

from vitscale.config import Config, merge_trees, split_batch
from vitscale.engine import create_engine
from vitscale.losses import classification_loss
from vitscale.optim import build_optimizer
from vitscale.train.build import build_model
from vitscale.train.footprint import planned_checkpoint_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"average": {"decay": 0.9}},
        {"optim": {"kind": "lamb", "weight_decay": 0.1}},
        {"optim": {"kind": "sgd", "momentum": 0.9}},
        {"optim": {"kind": "adafactor", "momentum": 0.9, "momentum_dtype": "bf16"}},
    ],
    ids=["adamw", "average", "lamb", "sgd", "adafactor"],
)
def test_bytes_of_a_tag_are_those_of_all_fragments(changes):
    tree = merge_trees(micro_tree(Path("nowhere"), Path("run")), {"engine": {"kind": "torch"}})
    config = Config.model_validate(merge_trees(tree, changes))
    model = build_model(config)
    planned = planned_checkpoint_bytes(config, model)
    engine = create_engine(
        model, build_optimizer(model, config.optim), classification_loss("softmax"), config.engine,
        split=split_batch(config.batch, 1), clip_norm=1.0, device=torch.device("cpu"), rank=0, average=config.average,
    )  # fmt: skip
    batches = [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1])) for _ in range(4)]
    engine.train_step(batches, 1e-3)
    saved = sum(v.nbytes for fragment in engine.fragments() if fragment.saved_here for v in fragment.values.values())
    assert saved == planned
