"""ImageNet's label spaces, the maps between them, and the place of their classes in WordNet.

A label space is a sequence of wnids; the place of a wnid is its label. The index keeps each sample's wnid, so
one build serves every label space. `label_spaces/` holds the lists, each with the way it was derived in its
first lines; `python -m data_tools.derive_label_spaces` derives them again.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitscale.errors import ConfigError

LABEL_SPACES = (
    "in21k_google",
    "in22k_ms",
    "in21k_fall11",
    "in21k_winter21",
    "in12k",
    "in21k_p_fall11",
    "in21k_p_winter21",
    "in1k",
)
LABEL_SPACES_FOLDER = Path(__file__).with_name("label_spaces")


@dataclass(frozen=True)
class LabelSpace:
    """A named sequence of classes: `wnids[label]` is a label's class, `derivation` where the list is from."""

    name: str
    wnids: tuple[str, ...]
    derivation: str


@dataclass(frozen=True)
class Hierarchy:
    """What WordNet says of the order among C classes, as arrays of labels; labels are places in `wnids`.

    An ancestor of a class is another of the C classes that is more general, over any way up in WordNet; a
    parent is an ancestor with no other ancestor in between. A class may have several parents.

    The level of a class is 0 where it has no parent, else one more than the highest level among its parents.
    So ancestors lie on lower levels, the classes of one level exclude each other, and a softmax over each
    level makes sense: this is what the semantic softmax of Ridnik et al. 2021 (ImageNet-21K pretraining for
    the masses) wants of its levels. Their own levels follow one parent a class, which leaves some classes on
    the level of an ancestor.
    """

    wnids: tuple[str, ...]
    level: NDArray[np.int32]
    """[C], 0 for the most general."""
    line: NDArray[np.int32]
    """[C, levels]. `line[c, l]` is c itself where l is its level, -1 above, and on each level below the one
    ancestor that is reached by always going to the parent one level down, of several to the smallest label.
    """
    parents: NDArray[np.int32]
    """[P, 2], pairs of a class and a parent, sorted."""
    ancestors: NDArray[np.int32]
    """[A, 2], pairs of a class and an ancestor, sorted."""


class _Synset(NamedTuple):
    parents: tuple[str, ...]
    name: str


@cache
def load_label_space(name: str) -> LabelSpace:
    """The label space of a name in `LABEL_SPACES`.

    Raises:
        ConfigError: no label space has this name.
    """
    if name not in LABEL_SPACES:
        close = difflib.get_close_matches(name, LABEL_SPACES, n=1, cutoff=0)[0]
        raise ConfigError(
            f"label space {name!r}: unknown: did you mean {close}? The names are {', '.join(LABEL_SPACES)}"
        )
    text = (LABEL_SPACES_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    header, lines = _split_header(text)
    return LabelSpace(name, _read_classes(lines), header)


def label_map(source: Sequence[str], target: Sequence[str], *, to_ancestors: bool = False) -> NDArray[np.int32]:
    """The label in `target` of each class of `source`, -1 where it has none.

    Args:
        source: wnids in label order.
        target: wnids in label order.
        to_ancestors: give a class that `target` lacks the label of its nearest ancestor there: the fewest
            steps up in WordNet, of several the smallest label.

    Returns:
        [len(source)]

    Raises:
        ConfigError: a wnid is in `target` twice.
    """
    labels = _labels(target)
    if to_ancestors:
        return np.array([_nearest_label(wnid, labels) for wnid in source], dtype=np.int32)
    return np.array([labels.get(wnid, -1) for wnid in source], dtype=np.int32)


def class_name(wnid: str) -> str:
    """The first word that WordNet gives for a class; the wnid itself where it is not one of ImageNet's.

    Names are for people: several classes share one (`crane` is a bird and a machine).
    """
    synset = _wordnet().get(wnid)
    return wnid if synset is None else synset.name


def build_hierarchy(wnids: Sequence[str]) -> Hierarchy:
    """The hierarchy among classes, given in label order.

    Raises:
        ConfigError: a wnid is neither in ImageNet nor above it in WordNet, or is there twice.
    """
    labels = _labels(wnids)
    above = [_labels_above(wnid, labels) for wnid in wnids]
    parents = [up.difference(*(above[label] for label in up)) for up in above]
    level = np.zeros(len(wnids), dtype=np.int32)
    # An ancestor has fewer ancestors than its descendants, so parents come first.
    general_first = sorted(range(len(wnids)), key=lambda label: len(above[label]))
    for label in general_first:
        level[label] = 1 + max((level[parent] for parent in parents[label]), default=-1)
    line = np.full((len(wnids), level.max(initial=-1) + 1), -1, dtype=np.int32)
    for label in general_first:
        if parents[label]:
            line[label] = line[min(p for p in parents[label] if level[p] == level[label] - 1)]
        line[label, level[label]] = label
    return Hierarchy(tuple(wnids), level, line, parents=_pairs(parents), ancestors=_pairs(above))


def _split_header(text: str) -> tuple[str, list[str]]:
    """Split a file of `label_spaces/` into its comment, one text without the marks, and its other lines."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:first]), lines[first:]


def _read_classes(lines: Sequence[str]) -> tuple[str, ...]:
    """Classes from a file's lines, taken in turn.

    `WNID` appends a class, `all NAME` those of another label space that are not there yet, but for those with
    a line `- WNID`; `+ WNID LABEL` inserts a class at its label.
    """
    removed = {line.removeprefix("- ") for line in lines if line.startswith("- ")}
    wnids: list[str] = []
    for line in lines:
        match line.split():
            case [wnid]:
                wnids.append(wnid)
            case ["all", name]:
                there = removed.union(wnids)
                wnids += [wnid for wnid in load_label_space(name).wnids if wnid not in there]
            case ["+", wnid, label]:
                wnids.insert(int(label), wnid)
    return tuple(wnids)


@cache
def _wordnet() -> dict[str, _Synset]:
    """Every class of every label space and all its ancestors in WordNet 3.0."""
    _, lines = _split_header((LABEL_SPACES_FOLDER / "wordnet.tsv").read_text(encoding="utf-8"))
    columns = (line.split("\t") for line in lines)
    return {wnid: _Synset(tuple(parents.split()), name) for wnid, parents, name in columns}


def _labels(wnids: Sequence[str]) -> dict[str, int]:
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    if len(labels) < len(wnids):
        twice = next(wnid for label, wnid in enumerate(wnids) if labels[wnid] != label)
        raise ConfigError(f"classes: {twice} is there twice, so its label is not clear: leave one out")
    return labels


def _nearest_label(wnid: str, labels: Mapping[str, int]) -> int:
    generation = {wnid}
    while generation:
        found = [labels[one] for one in generation if one in labels]
        if found:
            return min(found)
        generation = {parent for one in generation if one in _wordnet() for parent in _wordnet()[one].parents}
    return -1


def _labels_above(wnid: str, labels: Mapping[str, int]) -> set[int]:
    if wnid not in _wordnet():
        raise ConfigError(
            f"classes: {wnid} is not in WordNet as ImageNet uses it, so nothing is above it: leave it out"
        )
    above: set[str] = set()
    waiting = [wnid]
    while waiting:
        new = set(_wordnet()[waiting.pop()].parents) - above
        above |= new
        waiting.extend(new)
    return {labels[one] for one in above if one in labels}


def _pairs(related: Sequence[set[int]]) -> NDArray[np.int32]:
    pairs = [(label, other) for label, others in enumerate(related) for other in sorted(others)]
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)
