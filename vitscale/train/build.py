"""From a config to the parts of a run: datasets, batch split, model, loss, engine, loaders."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vitscale.checkpoint import (
    FORMATS,
    PortableModel,
    adapt_to,
    check_trunk,
    format_of,
    load_into,
    mirror_of,
    read_portable,
)
from vitscale.config import BatchSplit, Config, Phase, SplitSection, Timeline, lay_out
from vitscale.data.augment import Augmentation
from vitscale.data.labels import build_hierarchy
from vitscale.data.loader import TrainLoader
from vitscale.data.mixture import Mixture, Samples
from vitscale.data.recipes import MixtureRecipe
from vitscale.data.split import SplitIndex, open_split
from vitscale.data.stream import Stream, StreamRecipe
from vitscale.engine import TrainEngine, check_engine, check_execution, create_engine, resolve_precision
from vitscale.errors import ConfigError
from vitscale.losses import SIGMOID_HEAD_BIAS, Loss, classification_loss
from vitscale.model import Execution, Variant, VisionTransformer, create_model, executed_train_flops, resolve_variant
from vitscale.optim import build_optimizer, check_fused
from vitscale.ranks.groups import Ranks
from vitscale.telemetry import check_second_sink
from vitscale.train.teacher import read_teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blueprint:
    """A config checked against its data and its ranks: everything that is known before anything is built."""

    config: Config
    source: Mixture | Stream
    val_index: SplitIndex | None
    timeline: Timeline
    variant: Variant

    @property
    def total_steps(self) -> int:
        """Length of the run."""
        return self.timeline.total_steps

    @property
    def split(self) -> BatchSplit:
        """How the batch of the run's last phase, the one that the config gives, falls on ranks and micro-steps."""
        return self.timeline.phases[-1].split

    def phase_variant(self, phase: Phase) -> Variant:
        """The architecture at a phase's input size."""
        return self.variant if phase.img_size is None else replace(self.variant, img_size=phase.img_size)


def draw_blueprint(config: Config, ranks: Ranks, check_files: bool = True) -> Blueprint:
    """Check all that can be wrong with a run before it starts, without building the model.

    Index and shards are looked at where `check_files` says so: one rank is enough.

    Raises:
        ConfigError, ShardError, CheckpointError: one line each, with the mend.
    """
    variant = _resolve(config)
    _check_images(variant)
    check_second_sink(config.log.second_sink)
    mirror_of(config)  # refuses one whose client is not installed
    precision = resolve_precision(config.engine.precision, ranks.device)
    check_engine(
        config.engine,
        world_size=ranks.world_size,
        precision=precision,
        device_type=ranks.device.type,
        local_world_size=ranks.local_world_size,
    )
    check_execution(config.engine, precision, ranks.device, variant.head_dim)
    check_fused(config.optim, ranks.device)
    source, val_index = open_data(config, check_files)
    timeline = lay_out(config.schedule, config.batch, ranks.world_size, source.epoch_images)
    check_classes(config, source.classes)
    if config.init.path is not None:
        _check_init(config, variant)
    if config.loss.distill is not None:
        read_teacher(config.loss.distill, source.classes)
    blueprint = Blueprint(config, source, val_index, timeline, variant)
    for phase in timeline.phases:
        blueprint.phase_variant(phase)  # refuses an input of no whole number of patches
    return blueprint


def check_classes(config: Config, classes: Sequence[str]) -> None:
    """Make sure that head and loss are for these classes, the training data's wnids in label order.

    Raises:
        ConfigError: there are more or fewer of them, or the loss needs a hierarchy that they do not have.
    """
    if len(classes) != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes {config.model.num_classes} is not the {len(classes)} classes of the training data: "
            f"set model.num_classes={len(classes)}"
        )
    build_loss(config, classes)


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


def open_loader(
    blueprint: Blueprint, augmentation: Augmentation, split: BatchSplit, rank: int, start_position: int
) -> TrainLoader:
    """This rank's training micro-batches from a position on."""
    source, config = blueprint.source, blueprint.config.data
    shared = (config, augmentation, split, rank, start_position)
    return TrainLoader(MixtureRecipe(*shared, source) if isinstance(source, Mixture) else StreamRecipe(*shared, source))


def build_augmentation(blueprint: Blueprint, phase: Phase) -> Augmentation:
    """What happens to a phase's training images after the crop."""
    data, img_size = blueprint.config.data, blueprint.phase_variant(phase).image_px[0]
    return Augmentation(data.augment, blueprint.config.run.seed, img_size, data.flip, data.mean, data.std)


def build_engine(blueprint: Blueprint, ranks: Ranks, resumes: bool) -> tuple[TrainEngine, dict[str, list[int]]]:
    """The engine, equal on every rank, and the parameters' shapes.

    Args:
        blueprint: of the run.
        ranks: of the run.
        resumes: a checkpoint is about to be read, so `init.path` is not: thousands of ranks would read all of it.
    """
    config = blueprint.config
    torch.manual_seed(config.run.seed)
    model = build_model(config)
    if config.init.path is not None and not resumes:
        load_initial_weights(model, read_portable(config.init.path), config)
    model.to(ranks.device)
    # Taken here: under ZeRO stage 3 the engine leaves nothing of a parameter's shape.
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    engine = create_engine(
        model,
        build_optimizer(model, config.optim),
        build_loss(config, blueprint.source.classes),
        config.engine,
        split=blueprint.split,
        clip_norm=config.optim.clip_norm,
        device=ranks.device,
        rank=ranks.rank,
        average=config.average,
    )
    return engine, shapes


def build_loss(config: Config, classes: Sequence[str]) -> Loss:
    """The training loss; `classes` are the wnids in label order.

    Raises:
        ConfigError: the semantic loss is asked for, and WordNet does not know the classes or has none above another.
    """
    line = None
    if config.loss.kind == "semantic":
        try:
            line = build_hierarchy(classes).line
        except ConfigError as error:
            raise ConfigError(f"loss.kind=semantic needs a hierarchy: {error}; or use loss.kind=softmax") from None
    kind, distill = config.loss.kind, config.loss.distill
    return classification_loss(kind, config.loss.label_smoothing, line=line, distill=distill)


def executed_flops(config: Config, variant: Variant, split: BatchSplit) -> float | None:
    """FLOPs that training executes for an image, with its share of padding; None where the compiler decides."""
    engine, model = config.engine, config.model
    if engine.activation_checkpointing == "budget":
        return None
    flops = executed_train_flops(
        variant,
        split.micro_batch,
        execution=Execution(recompute=engine.activation_checkpointing, every=engine.checkpoint_every or 1),
        drop_rate=model.drop_rate,
        drop_path_rate=model.drop_path_rate,
        drop_path_mode=model.drop_path_mode,
    )
    return flops / split.micro_batch * (split.places / split.global_batch)


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
    for key in ("drop_rate", "drop_path_rate", "drop_path_mode", "head_multiple", "weight_init"):
        del arguments[key]
    return resolve_variant(arguments.pop("name"), **arguments)


def _check_init(config: Config, variant: Variant) -> None:
    path = config.init.path
    assert path is not None
    known = format_of(path)
    if known is not None and known not in FORMATS:
        raise ConfigError(
            f"init.path {path}: nothing in it says what it is: "
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
