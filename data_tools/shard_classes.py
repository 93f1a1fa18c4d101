"""What the samples of foreign shards say of their classes, and the class list that fits them all."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitscale.errors import ShardError

CLASS_EXTENSIONS = ("wnid", "cls", "json", "txt")
JSON_LABELS = ("label", "cls", "class")

# Extension and content of the members that tell a sample's class.
Told = tuple[tuple[str, bytes], ...]

# Numbers that no class list gives a name to.
NAMELESS = "class-{:05d}"


@functools.lru_cache(maxsize=1 << 16)  # most samples say what another one said
def read_class(told: Told) -> tuple[int, str]:
    """Label and wnid of a sample; -1 and "" for what its members do not tell.

    Args:
        told: extension and content: wnid a word; cls and txt a number or a word; json with "wnid", "label", "cls" or
            "class". A text of several words is a caption and tells nothing. Of several numbers or words the first
            counts, in the order of CLASS_EXTENSIONS.

    Raises:
        ValueError: no class, or one that cannot be understood; the message goes on from "sample KEY".
    """
    label, wnid = -1, ""
    for extension, content in sorted(told, key=lambda pair: CLASS_EXTENSIONS.index(pair[0])):
        for word in _words(extension, content):
            number = _label(word)
            if number is None:
                wnid = wnid or word
            elif label < 0:
                label = number
    if label < 0 and not wnid:
        raise ValueError(f"has no class: none of .{', .'.join(CLASS_EXTENSIONS)} tells one")
    return label, wnid


def resolve_classes(root: Path, table: pa.Table, classes: Sequence[str] | None) -> tuple[tuple[str, ...], pa.Table]:
    """The class list of a table of samples, and the table with a label and a wnid in every row.

    Args:
        root: folder of the shards, for messages.
        table: one row a sample with label (-1 for none), wnid ("" for none), shard, offset and key.
        classes: the list that numbers are places in; None makes one of what the samples tell.

    Raises:
        ShardError: a number or wnid outside the list, or a sample whose number and wnid are two classes.
    """
    joined = pc.binary_join_element_wise(table["label"].cast(pa.string()), table["wnid"], " ")
    told = joined.combine_chunks().dictionary_encode()
    codes = told.indices.to_numpy()
    pairs = [(int(label), wnid) for label, _, wnid in (pair.partition(" ") for pair in told.dictionary.to_pylist())]
    chosen = tuple(classes) if classes is not None else _classes_of(pairs)
    place = {wnid: label for label, wnid in enumerate(chosen)}
    labels = np.empty(len(pairs), dtype=np.int32)
    for code, (label, wnid) in enumerate(pairs):
        fault = _fault(label, wnid, chosen, place)
        if fault:
            row = table.slice(int(np.argmax(codes == code)), 1).to_pylist()[0]
            raise ShardError(f"{root / row['shard']}: offset {row['offset']}: sample {row['key']}: {fault}")
        labels[code] = place[wnid] if wnid else label
    final = labels[codes]
    names = pa.DictionaryArray.from_arrays(pa.array(final), pa.array(chosen, pa.string()))
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(final))
    return chosen, table.set_column(table.schema.get_field_index("wnid"), "wnid", names)


def _words(extension: str, content: bytes) -> list[str]:
    try:
        text = content.decode().strip()
        if extension != "json":
            return [text] if len(text.split()) == 1 else []
        tree = json.loads(text)
    except ValueError:
        raise ValueError(f"has a .{extension} that cannot be read") from None
    found = [tree[name] for name in ("wnid", *JSON_LABELS) if name in tree] if isinstance(tree, dict) else []
    return [str(value) for value in found if isinstance(value, int | str) and len(str(value).split()) == 1]


def _label(word: str) -> int | None:
    try:
        label = int(word)
    except ValueError:
        return None
    if not 0 <= label < 1 << 31:
        raise ValueError(f"has the label {label}, which is no place in a class list")
    return label


def _classes_of(pairs: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    """Classes by what the samples tell: by their numbers, where there are any, else the wnids in order."""
    highest = max(label for label, _ in pairs)
    if highest < 0:
        return tuple(sorted({wnid for _, wnid in pairs}))
    classes = [NAMELESS.format(label) for label in range(highest + 1)]
    for label, wnid in pairs:
        if label >= 0 and wnid:
            classes[label] = wnid
    return tuple(classes)


def _fault(label: int, wnid: str, classes: Sequence[str], place: Mapping[str, int]) -> str | None:
    if label >= len(classes):
        return f"label {label}, of {len(classes)} classes: give the class list that the shards were made with"
    if wnid and wnid not in place:
        return f"class {wnid} is not in the class list: give the one that the shards were made with"
    if wnid and label >= 0 and place[wnid] != label:
        return (
            f"label {label} and class {wnid} do not belong together, in the class list {wnid} is {place[wnid]}: give "
            "the list that the shards were made with"
        )
    return None
