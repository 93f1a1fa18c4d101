"""From a config to the parts of a run: datasets, batch split, model, loss, engine, loaders."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vitscale.checkpoint import Card, load_exported, read_card
from vitscale.config import BatchSplit, Config, split_batch, total_steps
from vitscale.data.index import SplitIndex, open_split
from vitscale.engine import TrainEngine, create_engine, render_deepspeed_config, resolve_precision
from vitscale.errors import CheckpointError, ConfigError
from vitscale.losses import SIGMOID_HEAD_BIAS, classification_loss
from vitscale.model import Variant, VisionTransformer, create_model, resample_pos_embed, resolve_variant
from vitscale.optim import build_optimizer
from vitscale.ranks import Ranks


@dataclass(frozen=True)
class Blueprint:
    """A config checked against its data and its ranks: everything that is known before anything is built."""

    config: Config
    train_index: SplitIndex
    val_index: SplitIndex | None
    split: BatchSplit
    total_steps: int
    variant: Variant


def draw_blueprint(config: Config, world_size: int, device: torch.device) -> Blueprint:
    """Check all that can be wrong with a run before it starts, without building the model.

    Raises:
        ConfigError, ShardError, CheckpointError: one line each, with the mend.
    """
    split = split_batch(config.batch, world_size)
    variant = _resolve(config)
    render_deepspeed_config(
        config.engine, split, config.optim.clip_norm, resolve_precision(config.engine.precision, device)
    )
    train_index = open_split(config.data.train.path, config.data.train.split)
    val = config.data.val
    val_index = open_split(val.path, val.split) if val is not None else None
    if len(train_index.classes) != variant.num_classes:
        raise ConfigError(
            f"model.num_classes {variant.num_classes} is not the {len(train_index.classes)} classes of "
            f"{config.data.train.path}: set model.num_classes={len(train_index.classes)}"
        )
    if val_index is not None and val_index.classes != train_index.classes:
        raise ConfigError(
            f"data.val {config.data.val.path if config.data.val else ''} has other classes than data.train "
            f"{config.data.train.path}: build both from the same list of classes"
        )
    if config.init.path is not None:
        _check_init(read_card(config.init.path), variant, config)
    steps = total_steps(config.schedule, split.global_batch, len(train_index))
    return Blueprint(config, train_index, val_index, split, steps, variant)


def build_engine(blueprint: Blueprint, ranks: Ranks) -> tuple[TrainEngine, dict[str, list[int]]]:
    """The engine, equal on every rank (the weights follow from the seed alone), and the parameters' shapes."""
    config = blueprint.config
    torch.manual_seed(config.run.seed)
    model = build_model(config)
    if config.init.path is not None:
        card, weights = load_exported(config.init.path)
        load_initial_weights(model, card, weights)
    model.activation_checkpointing = config.engine.activation_checkpointing == "full"
    model.to(ranks.device)
    # Taken here: under ZeRO stage 3 the engine leaves nothing of a parameter's shape.
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    engine = create_engine(
        model,
        build_optimizer(model, config.optim),
        classification_loss(config.loss.kind, config.loss.label_smoothing),
        config.engine,
        split=blueprint.split,
        clip_norm=config.optim.clip_norm,
        device=ranks.device,
        rank=ranks.rank,
    )
    return engine, shapes


def build_model(config: Config) -> VisionTransformer:
    """The model with fresh weights on the default device, as `torch.device("meta")` may set it."""
    return create_model(
        **model_arguments(config),
        head_bias_init=SIGMOID_HEAD_BIAS if config.loss.kind == "sigmoid" else 0.0,
    )


def model_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `create_model`, but for the head's first bias.

    A model that starts from an exported one and drops its representation layer has none of its own.
    """
    arguments = config.model.model_dump()
    if config.init.path is not None and config.init.representation == "drop":
        arguments["representation_size"] = 0
    return arguments


def exported_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `create_model` that rebuild the trained model, with every number written out."""
    shape = asdict(_resolve(config))
    known = {key: shape[key] for key in model_arguments(config) if key in shape}
    return {"name": config.model.name, **known}


def load_initial_weights(model: VisionTransformer, card: Card, weights: dict[str, Tensor]) -> None:
    """Copy an exported model's weights into a model with a fresh head.

    The position embedding is resampled to the model's grid, the representation layer is taken over where the
    model has one, and the head stays as it is.

    Raises:
        CheckpointError: the weights are of another architecture.
    """
    wanted = {name: p for name, p in model.state_dict().items() if not name.startswith("head.")}
    found = {name: value for name, value in weights.items() if not name.startswith("head.")}
    if model.variant.representation_size == 0:
        found = {name: value for name, value in found.items() if not name.startswith("pre_logits.")}
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise CheckpointError(f"init.path: the exported {card.model['name']} and the model differ in {odd[0]}")
    found["pos_embed"] = resample_pos_embed(found["pos_embed"], model.variant.grid, model.variant.prefix_tokens)
    with torch.no_grad():
        for name, target in wanted.items():
            if found[name].shape != target.shape:
                raise CheckpointError(
                    f"init.path: {name} has shape {list(found[name].shape)} in the exported {card.model['name']}, "
                    f"the model wants {list(target.shape)}"
                )
            target.copy_(found[name])


def _resolve(config: Config) -> Variant:
    arguments = model_arguments(config)
    del arguments["drop_rate"], arguments["drop_path_rate"]
    return resolve_variant(arguments.pop("name"), **arguments)


def _check_init(card: Card, variant: Variant, config: Config) -> None:
    if config.init.representation == "keep" and card.representation_size != variant.representation_size:
        raise ConfigError(
            f"init.representation=keep: {config.init.path} has a representation layer of {card.representation_size}, "
            f"the model of {variant.representation_size}: set model.representation_size={card.representation_size}"
        )
    for key in ("patch_size", "embed_dim", "depth", "num_heads", "pool", "in_chans", "qkv_bias"):
        if card.model[key] != getattr(variant, key):
            raise ConfigError(
                f"init.path {config.init.path} has {key} {card.model[key]}, the model {getattr(variant, key)}: "
                f"set model.{key}={card.model[key]}"
            )
