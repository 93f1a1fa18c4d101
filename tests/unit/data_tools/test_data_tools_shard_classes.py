"""Classes of foreign shards: what a sample's members tell, and the class list made of it."""

from pathlib import Path

import pyarrow as pa
import pytest

from data_tools.shard_classes import read_class, resolve_classes
from vitscale.errors import ShardError


def told(**members: bytes) -> tuple[tuple[str, bytes], ...]:
    return tuple(members.items())


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (told(cls=b"12"), (12, "")),
        (told(cls=b" 12\n"), (12, "")),
        (told(cls=b"n00000012"), (-1, "n00000012")),
        (told(wnid=b"n00000012\n", cls=b"3"), (3, "n00000012")),
        (told(txt=b"7"), (7, "")),
        (told(txt=b"a dog on a lawn", cls=b"7"), (7, "")),
        (told(txt=b"5", cls=b"7"), (7, "")),
        (told(json=b'{"label": 4, "wnid": "n00000001", "caption": "a dog"}'), (4, "n00000001")),
        (told(json=b'{"class": 4}'), (4, "")),
        (told(json=b'{"label": 1.5, "cls": 2}'), (2, "")),
        (told(json=b"[1]", cls=b"0"), (0, "")),
    ],
)
def test_a_sample_tells_its_label_and_its_wnid(members, expected):
    assert read_class(members) == expected


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ((), "has no class"),
        (told(txt=b"a dog"), "has no class"),
        (told(json=b"{}"), "has no class"),
        (told(json=b"{"), "has a .json that cannot be read"),
        (told(cls=b"\xff"), "has a .cls that cannot be read"),
        (told(cls=b"-1"), "label -1"),
        (told(cls=str(1 << 31).encode()), "label 2147483648"),
    ],
)
def test_a_sample_without_a_class_is_refused(members, said):
    with pytest.raises(ValueError, match=said):
        read_class(members)


def table(*pairs: tuple[int, str]) -> pa.Table:
    count = len(pairs)
    return pa.table(
        {
            "key": [f"k{i}" for i in range(count)],
            "shard": ["s.tar"] * count,
            "offset": pa.array([512 * i for i in range(count)], pa.int64()),
            "label": pa.array([label for label, _ in pairs], pa.int32()),
            "wnid": pa.array([wnid for _, wnid in pairs], pa.string()),
        }
    )


@pytest.mark.parametrize(
    ("pairs", "given", "classes", "labels"),
    [
        ([(2, ""), (0, "")], None, ("class-00000", "class-00001", "class-00002"), [2, 0]),
        ([(-1, "b"), (-1, "a"), (-1, "b")], None, ("a", "b"), [1, 0, 1]),
        ([(2, "a"), (0, "b"), (2, "a")], None, ("b", "class-00001", "a"), [2, 0, 2]),
        ([(2, "a"), (-1, "a")], None, ("class-00000", "class-00001", "a"), [2, 2]),
        ([(1, ""), (-1, "z"), (0, "z")], ("z", "y"), ("z", "y"), [1, 0, 0]),
    ],
)
def test_the_class_list_fits_what_the_samples_tell(pairs, given, classes, labels):
    chosen, resolved = resolve_classes(Path("root"), table(*pairs), given)
    assert chosen == classes
    assert resolved["label"].to_pylist() == labels
    assert resolved["wnid"].to_pylist() == [classes[label] for label in labels]


@pytest.mark.parametrize(
    ("pairs", "given", "said"),
    [
        ([(0, ""), (2, "")], ("a", "b"), "root/s.tar: offset 512: sample k1: label 2, of 2 classes"),
        ([(-1, "c")], ("a", "b"), "sample k0: class c is not in the class list"),
        ([(0, "a"), (0, "b")], ("a", "b"), "k1: label 0 and class b do not belong together, in the class list b is 1"),
        ([(0, "a"), (0, "b")], None, "sample k0: class a is not in the class list"),
        ([(0, "a"), (-1, "b")], None, "sample k1: class b is not in the class list"),
        ([(0, "a"), (1, "a")], None, "sample k0: label 0 and class a do not belong together"),
    ],
)
def test_samples_that_contradict_the_list_or_each_other_are_refused(pairs, given, said):
    with pytest.raises(ShardError) as caught:
        resolve_classes(Path("root"), table(*pairs), given)
    assert said in str(caught.value)
