"""The user's cache: $VITSCALE_CACHE, else $XDG_CACHE_HOME/vitscale, else ~/.cache/vitscale."""

import os
from pathlib import Path

from vitscale.errors import ConfigError

CACHE_VARIABLE = "VITSCALE_CACHE"
"""Environment variable: the folder of downloads and of what is converted once a node."""


def cache_folder() -> Path:
    """The folder; it need not exist yet.

    Raises:
        ConfigError: it is below a home that does not exist.
    """
    named = os.environ.get(CACHE_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vitscale")
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"no folder for the cache: {error}: name one in {CACHE_VARIABLE}") from None
