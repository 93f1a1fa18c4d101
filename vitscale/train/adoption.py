"""Going on from a training checkpoint that DeepSpeed itself wrote."""

import datetime
from pathlib import Path

import torch

from vitscale.checkpoint import Manifest, adopt, read_deepspeed
from vitscale.config import Config, lay_out
from vitscale.errors import ConfigError
from vitscale.train.build import build_model, check_classes, exported_arguments, open_data
from vitscale.train.run_directory import library_versions


def adopt_deepspeed(source: Path, config: Config, out: Path, unsafe_pickle: bool = False) -> Path:
    """Turn a checkpoint of DeepSpeed's into a tag that `run.branch_from` takes; returns the tag's folder.

    It has the fp32 weights, Adam's two moments and the step count. The position in the data is what as many steps
    of the config come to, for DeepSpeed knows nothing of our data order.

    Args:
        source: the folder that save_checkpoint was given, or one of its tags; a universal one too.
        config: of the run that is to go on.
        out: the run directory to create.
        unsafe_pickle: whether to execute pickles that cannot be read otherwise.

    Raises:
        CheckpointError: the checkpoint is damaged, has no moments, or is of another model than the config's.
        ConfigError: the config's optimizer is no AdamW, or its run is over before the checkpoint's step.
        ShardError: the config's data is missing or damaged.
    """
    if config.optim.kind != "adamw":
        raise ConfigError(f"optim.kind={config.optim.kind}: DeepSpeed's moments are Adam's: set optim.kind=adamw")
    contents = read_deepspeed(source, unsafe_pickle)
    data, _ = open_data(config)
    check_classes(config, data.classes)
    timeline = lay_out(config.schedule, config.batch, 1, data.epoch_images)
    if contents.step >= timeline.total_steps:
        raise ConfigError(
            f"{contents.tag} is of step {contents.step}, the run that the config describes ends with step "
            f"{timeline.total_steps}: raise schedule.length"
        )
    with torch.device("meta"):
        model = build_model(config)
    manifest = Manifest(
        step=contents.step,
        generation=0,
        world_size=1,
        optimizer_steps=contents.optimizer_steps,
        cursor=data.cursor(timeline.images_at(contents.step)).to_dict(),
        config=config.model_dump(mode="json"),
        model=exported_arguments(config),
        labels=list(data.classes),
        shapes={name: list(parameter.shape) for name, parameter in model.named_parameters()},
        metrics={},
        versions=library_versions(),
        saved_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        files=[],
    )
    return out / "checkpoints" / adopt(contents, out, manifest)
