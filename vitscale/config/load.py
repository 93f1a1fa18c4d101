"""From YAML files and `key=value` words to a validated `Config`.

A file may name others to start from with the key `base` (one path or a list, relative to the file). They
are merged in order, mappings key by key, then the file itself, then the overrides; the later one wins.
"""

import difflib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vitscale.config.schema import Config
from vitscale.config.section import Section
from vitscale.errors import ConfigError

BASE_KEY = "base"

S = TypeVar("S", bound=Section)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load a config file with its bases, apply the overrides and validate.

    Args:
        path: the YAML file.
        overrides: words of the form `section.key=value`; the value is read as YAML.

    Raises:
        ConfigError: a file is missing or no YAML, a base leads round in a circle, or a key or value is wrong.
    """
    tree = _compose(path, seen=())
    for word in overrides:
        tree = merge_trees(tree, _parse_override(word))
    run = tree.setdefault("run", {})
    if isinstance(run, dict) and run.get("dir") is None:
        run["dir"] = str(Path("runs") / path.stem)
    return parse_config(tree, source=" ".join([str(path), *overrides]))


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a tree of plain values; `source` names it in the error.

    Raises:
        ConfigError: naming the first wrong key, the value and the nearest right key.
    """
    return validate(Config, tree, source)


def validate(model: type[S], tree: Mapping[str, Any], source: str) -> S:
    """Validate a tree of plain values as a section of any kind; `source` names it in the error.

    Raises:
        ConfigError: naming the first wrong key, the value and the nearest right key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # A misspelt key often makes another one missing: the misspelling is the one to name.
        found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        problems = [_describe(problem, model) for problem in found]
        rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {problems[0]}{rest}") from None


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two config trees, in the order of the first."""
    keys: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        left, right = old.get(key), new.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            keys += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            keys.append(f"{prefix}{key}")
    return keys


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which PyYAML would silently let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no key of a dict: the base class says so
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class PlainLoader(_UniqueKeyLoader):
    """The same, and every scalar stays the text it is; YAML 1.1 takes 1:30:00 for a number to the base of 60."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (so it is declared above)


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = _UniqueKeyLoader) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: it is missing or no YAML, gives a key twice, or holds something else.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as error:
        raise ConfigError.of_system(error, f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, such as 2026-13-01
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, this file holds {type(tree).__name__}")
    return tree


def _compose(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(
            f"{path}: {BASE_KEY} leads back to this file: {' -> '.join(p.name for p in (*seen, resolved))}"
        )
    own = read_yaml(path)
    bases = own.pop(BASE_KEY, [])
    tree: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: {BASE_KEY} holds paths of other configs, not {base!r}")
        tree = merge_trees(tree, _compose(path.parent / base, (*seen, resolved)))
    return merge_trees(tree, own)


def merge_trees(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with `over` laid on it: mappings key by key, everything else replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge_trees(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _parse_override(word: str) -> dict[str, Any]:
    dotted, equals, text = word.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {word!r}: write section.key=value, such as optim.peak_lr=1e-3")
    try:
        value: Any = yaml.safe_load(text) if text else None
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override {word!r}: the value is not valid YAML; quote it for the shell") from None
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)  # there is at least one key
    return value


def _describe(problem: Any, model: type[BaseModel]) -> str:
    """One pydantic problem in a line: the dotted key, what is wrong, the mend."""
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location)
    if problem["type"] == "extra_forbidden":
        *parents, key = location
        known = list(_fields_at(parents, model))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        mend = f"did you mean {'.'.join([*parents, near[0]])}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {dotted}: {mend}"
    if problem["type"] == "missing":
        return f"{dotted} is missing: give it in the file or as {dotted}=VALUE"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not location:
        return message
    return f"{dotted}: {message}" + ("" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})")


def _fields_at(parents: Iterable[str], model: type[BaseModel]) -> Iterable[str]:
    for name in parents:
        if name.isdecimal():
            continue  # the place of a section in a list of them
        annotation = model.model_fields[name].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model.model_fields
