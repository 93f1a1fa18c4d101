"""Class lists as a command takes them: the name of a label space, or a file with a class a line."""

from collections.abc import Sequence
from pathlib import Path

from vitscale.data.labels import LABEL_SPACES, load_label_space
from vitscale.errors import ConfigError


def read_class_list(words: str) -> tuple[tuple[str, ...], str | None]:
    """Classes in label order, and the name of their label space if they are one.

    Args:
        words: a name of LABEL_SPACES, or a file whose lines begin with a wnid each (what follows is a comment).

    Raises:
        ConfigError: neither of the two, or the file is empty or holds a class twice.
    """
    if words in LABEL_SPACES:
        return load_label_space(words).wnids, words
    try:
        lines = Path(words).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{words}: is no label space and no readable file ({error}): give one of {', '.join(LABEL_SPACES)}, or a "
            "file with a wnid a line"
        ) from None
    classes = tuple(line.split()[0] for line in lines if line.strip() and not line.startswith("#"))
    if not classes:
        raise ConfigError(f"{words}: holds no classes: give a file with a wnid a line")
    if len(set(classes)) < len(classes):
        raise ConfigError(
            f"{words}: holds {_first_repeated(classes)} twice: remove one, labels are places in this list"
        )
    return classes, None


def _first_repeated(classes: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(wnid for wnid in classes if wnid in seen or seen.add(wnid))  # type: ignore[func-returns-value]
