"""The points of a sweep: one config with several values of some keys, each with a run directory of its own."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitscale.config import Config, load_config
from vitscale.config.load import PlainLoader
from vitscale.errors import LaunchError

LONGEST_NAME = 200
"""Characters; file systems take 255."""


@dataclass(frozen=True)
class Point:
    """One run of a job."""

    name: str
    """Of its run directory below that of the sweep; empty where there is no sweep."""
    config: Config

    @property
    def run_dir(self) -> Path:
        """Where it lives."""
        assert self.config.run.dir is not None  # load_config fills it in
        return self.config.run.dir


def draw_points(config_path: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Point]:
    """The runs of a job: one without a sweep, else the product of all sweeps.

    Args:
        config_path: the YAML file.
        overrides: words `section.key=value` for all points.
        sweeps: each `section.key=value,value` or the path of a YAML file with a list of mappings from keys to values.

    Raises:
        ConfigError: a point's config is wrong.
        LaunchError: a sweep is none, or two points would share a run directory.
    """
    whole = load_config(config_path, overrides)
    if not sweeps:
        return [Point("", whole)]
    run_dir = Point("", whole).run_dir
    points: dict[str, Point] = {}
    for choices in itertools.product(*map(read_sweep, sweeps)):
        words = [f"{key}={value}" for choice in choices for key, value in choice.items()]
        name = name_point(words)
        if name in points:
            raise LaunchError(f"--sweep: two points have the run directory {run_dir / name}: give each value once")
        config = load_config(config_path, [*overrides, *words, f"run.dir={run_dir / name}"])
        points[name] = Point(name, config)
    return list(points.values())


def read_sweep(text: str) -> list[Mapping[str, str]]:
    """The choices of one --sweep, each a mapping from keys to values as they are written on the command line.

    Raises:
        LaunchError: it is neither KEY=V1,V2 nor a file with a list of mappings.
    """
    key, equals, values = text.partition("=")
    choices: list[Mapping[str, str]] = (
        [{key: value} for value in split_values(values)] if equals else _read_file(Path(text))
    )
    if not choices or any(not key or not value for choice in choices for key, value in choice.items()):
        raise LaunchError(f"--sweep {text}: write section.key=value,value or the name of a YAML file")
    if any(key == "run.dir" for choice in choices for key in choice):
        raise LaunchError(f"--sweep {text}: each point gets a run directory of its own: leave run.dir out")
    return list(choices)


def split_values(text: str) -> list[str]:
    """Parts of the text between commas that stand in no bracket or quote.

    >>> split_values("1,[2,3],{a: 4, b: 5},'6,7'")
    ['1', '[2,3]', '{a: 4, b: 5}', "'6,7'"]
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
            if character == "," and depth == 0:
                parts.append("")
                continue
        parts[-1] += character
    return [part.strip() for part in parts]


def name_point(words: Sequence[str]) -> str:
    """A folder's name for a point: `optim.peak_lr-1e-3_model.depth-12`."""
    return "_".join(re.sub(r"[^\w.+-]+", "-", word).strip("-") for word in words)[:LONGEST_NAME]


def _read_file(file: Path) -> list[Mapping[str, str]]:
    try:
        choices: Any = yaml.load(file.read_text(encoding="utf-8"), Loader=PlainLoader)
    except OSError as error:
        raise LaunchError(f"--sweep {file}: {error.strerror}: write section.key=value,value or a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LaunchError(f"--sweep {file}: not valid YAML: {' '.join(str(error).split())}") from None
    scalars = isinstance(choices, list) and all(
        isinstance(choice, dict) and choice and all(isinstance(v, str) for v in choice.values()) for choice in choices
    )
    if not scalars:
        raise LaunchError(
            f"--sweep {file}: no list of mappings from keys to values: write lines such as '- {{optim.peak_lr: 1e-3}}'"
        )
    return list(choices)
