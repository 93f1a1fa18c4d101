"""The config that a run directory was started with, and what a later start may change of it."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from vitscale.config.load import differing_keys, parse_config, read_yaml
from vitscale.config.schema import Config
from vitscale.errors import ConfigError, RunDirectoryError


def check_recorded(file: Path, config: Config, allow_change: Sequence[str] = ()) -> None:
    """Compare a config with the one on record; where `file` is not there, nothing is.

    Args:
        file: RUN/config.yaml.
        config: of the start to come.
        allow_change: dotted keys that may differ.

    Raises:
        RunDirectoryError: others differ, or the one on record was damaged.
    """
    if not file.exists():
        return
    try:
        recorded = read_yaml(file)
    except ConfigError as error:
        damaged = RunDirectoryError(
            f"{error}: put back what the run began with (`vitscale checkpoint inspect {file.parent}` shows it), or "
            "remove the file to go on with the config that is given"
        )
        damaged.status = error.status
        raise damaged from None
    with contextlib.suppress(ConfigError):  # keys that are newer than the run have their defaults in it
        recorded = parse_config(recorded, source=str(file)).model_dump(mode="json")
    keys = differing_keys(recorded, config.model_dump(mode="json"))
    changed = [key for key in keys if key not in allow_change]
    if changed:
        flags = " ".join(f"--allow-change {key}" for key in changed)
        raise RunDirectoryError(
            f"{file.parent}: its config differs in {', '.join(changed)}: choose another run.dir, or go on with {flags}"
        )
