"""The config that a run directory was started with, and what a later start may change of it."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import yaml

from vitscale.config.load import differing_keys, parse_config
from vitscale.config.schema import Config
from vitscale.errors import ConfigError, RunDirectoryError


def check_recorded(file: Path, config: Config, allow_change: Sequence[str] = ()) -> None:
    """Compare a config with the one on record; where `file` is not there, nothing is.

    Args:
        file: RUN/config.yaml.
        config: of the start to come.
        allow_change: dotted keys that may differ.

    Raises:
        RunDirectoryError: others differ.
    """
    if not file.exists():
        return
    recorded = yaml.safe_load(file.read_text(encoding="utf-8"))
    with contextlib.suppress(ConfigError):  # keys that are newer than the run have their defaults in it
        recorded = parse_config(recorded, source=str(file)).model_dump(mode="json")
    keys = differing_keys(recorded, config.model_dump(mode="json"))
    changed = [key for key in keys if key not in allow_change]
    if changed:
        flags = " ".join(f"--allow-change {key}" for key in changed)
        raise RunDirectoryError(
            f"{file.parent}: its config differs in {', '.join(changed)}: choose another run.dir, or go on with {flags}"
        )
