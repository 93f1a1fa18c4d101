"""From a config to the parts of a run: datasets, batch split, model, loss, engine, loaders."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitscale.checkpoint import READERS, PortableModel, adapt_to, check_trunk, load_into, read_portable
from vitscale.config import BatchSplit, Config, SplitSection, split_batch, total_steps
from vitscale.data.augment import Augmentation
from vitscale.data.loader import TrainLoader
from vitscale.data.mixture import Mixture, Samples
from vitscale.data.recipes import MixtureRecipe
from vitscale.data.split import SplitIndex, open_split
from vitscale.data.stream import Stream, StreamRecipe
from vitscale.engine import TrainEngine, create_engine, render_deepspeed_config, resolve_precision
from vitscale.errors import ConfigError
from vitscale.losses import SIGMOID_HEAD_BIAS, classification_loss
from vitscale.model import Variant, VisionTransformer, create_model, resolve_variant
from vitscale.optim import build_optimizer
from vitscale.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blueprint:
    """A config checked against its data and its ranks: everything that is known before anything is built."""

    config: Config
    source: Mixture | Stream
    val_index: SplitIndex | None
    split: BatchSplit
    total_steps: int
    variant: Variant


def draw_blueprint(config: Config, world_size: int, device: torch.device, check_files: bool = True) -> Blueprint:
    """Check all that can be wrong with a run before it starts, without building the model.

    Index and shards are looked at where `check_files` says so: one rank is enough.

    Raises:
        ConfigError, ShardError, CheckpointError: one line each, with the mend.
    """
    split = split_batch(config.batch, world_size)
    variant = _resolve(config)
    _check_images(variant)
    render_deepspeed_config(
        config.engine, split, config.optim.clip_norm, resolve_precision(config.engine.precision, device)
    )
    source, val_index = open_data(config, check_files)
    classes = source.classes
    if len(classes) != variant.num_classes:
        raise ConfigError(
            f"model.num_classes {variant.num_classes} is not the {len(classes)} classes of the training data: "
            f"set model.num_classes={len(classes)}"
        )
    if config.init.path is not None:
        _check_init(config, variant)
    steps = total_steps(config.schedule, split.global_batch, source.epoch_images)
    return Blueprint(config, source, val_index, split, steps, variant)


def open_data(config: Config, check_files: bool = True) -> tuple[Mixture | Stream, SplitIndex | None]:
    """The training samples and the validation split, if there is one, in the same classes.

    Raises:
        ShardError: a dataset is missing or damaged.
        ConfigError: the datasets have different classes.
    """
    data = config.data

    def opened(section: SplitSection) -> SplitIndex:
        return open_split(section.path, section.split, label_space=data.label_space, check_files=check_files)

    indexes = tuple(opened(source) for source in data.sources)
    val_index = opened(data.val) if data.val is not None else None
    if data.stream is not None:
        if val_index is not None and len(val_index.classes) != data.stream.num_classes:
            raise ConfigError(
                f"data.val has {len(val_index.classes)} classes, data.stream.num_classes is {data.stream.num_classes}: "
                "validate on a split in the same label space"
            )
        return Stream(data.stream, config.run.seed), val_index
    for section, index in zip((*data.sources, data.val), (*indexes, val_index), strict=True):
        if section is not None and index is not None and index.classes != indexes[0].classes:
            raise ConfigError(
                f"{section.path} has other classes than {data.sources[0].path}: name a label space that holds both "
                "in data.label_space, or build both from the same list of classes"
            )
    repeats = data.augment.repeats
    return Mixture(Samples(indexes), data.weights, config.run.seed, data.lanes, data.block, repeats), val_index


def open_loader(blueprint: Blueprint, augmentation: Augmentation, rank: int, start_position: int) -> TrainLoader:
    """This rank's training micro-batches from a position on."""
    source, config = blueprint.source, blueprint.config.data
    shared = (config, augmentation, blueprint.split, rank, start_position)
    return TrainLoader(MixtureRecipe(*shared, source) if isinstance(source, Mixture) else StreamRecipe(*shared, source))


def build_augmentation(blueprint: Blueprint) -> Augmentation:
    """What happens to the training images after the crop."""
    data, img_size = blueprint.config.data, blueprint.variant.image_px[0]
    return Augmentation(data.augment, blueprint.config.run.seed, img_size, data.flip, data.mean, data.std)


def build_engine(blueprint: Blueprint, ranks: Ranks) -> tuple[TrainEngine, dict[str, list[int]]]:
    """The engine, equal on every rank (the weights follow from the seed alone), and the parameters' shapes."""
    config = blueprint.config
    torch.manual_seed(config.run.seed)
    model = build_model(config)
    if config.init.path is not None:
        load_initial_weights(model, read_portable(config.init.path), config)
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
    scheme = config.model.weight_init
    return create_model(
        **model_arguments(config),
        # Under jax_nlhb the head asks for a bias of its own, which is nearly the same for 21,843 classes.
        head_bias_init=SIGMOID_HEAD_BIAS if config.loss.kind == "sigmoid" and scheme != "jax_nlhb" else None,
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
    return {"name": config.model.name, **_resolve(config).arguments()}


def load_initial_weights(model: VisionTransformer, found: PortableModel, config: Config) -> None:
    """Copy a pretrained model's weights into a model with a fresh head.

    The position embedding is resized to the model's grid, the representation layer is taken over where the
    model has one, and the head stays as it is.

    Raises:
        CheckpointError: the weights are of another architecture, or damaged.
    """
    headless = replace(model.variant, num_classes=0)
    load_into(model, adapt_to(found, headless, config.init.pos_embed))


def _resolve(config: Config) -> Variant:
    arguments = model_arguments(config)
    for key in ("drop_rate", "drop_path_rate", "weight_init"):
        del arguments[key]
    return resolve_variant(arguments.pop("name"), **arguments)


def _check_init(config: Config, variant: Variant) -> None:
    path = config.init.path
    assert path is not None
    if READERS["state_dict"].recognises(path):
        raise ConfigError(
            f"init.path {path}: such a file does not say what it is: "
            f"`vitscale import {path} --model NAME --out FOLDER`, then init.path=FOLDER"
        )
    found = read_portable(path)
    if config.init.representation == "keep" and found.variant.representation_size != variant.representation_size:
        size = found.variant.representation_size
        raise ConfigError(
            f"init.representation=keep: {path} has a representation layer of {size}, "
            f"the model of {variant.representation_size}: set model.representation_size={size}"
        )
    check_trunk(found, variant)
    pixels = found.preprocessing
    if (pixels.mean, pixels.std) != (config.data.mean, config.data.std):
        log.warning(
            "init.path %s was trained on pixels with mean %s and std %s, data.mean and data.std are %s and %s",
            path, list(pixels.mean), list(pixels.std), list(config.data.mean), list(config.data.std),
        )  # fmt: skip


def _check_images(variant: Variant) -> None:
    """The loaders make square RGB images."""
    if variant.in_chans != 3:
        raise ConfigError(f"model.in_chans {variant.in_chans}: shards hold RGB images: use model.in_chans=3")
    height, width = variant.image_px
    if height != width:
        raise ConfigError(f"model.img_size [{height}, {width}]: the loaders crop squares: give one number")
