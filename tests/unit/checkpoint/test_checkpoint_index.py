"""The index says of every run where it lies, in a size that does not grow with the ranks."""

import errno
import itertools
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitscale.checkpoint import INDEX_NAME, Manifest, parameter_shapes, rank_file_name, record_file, write_index
from vitscale.checkpoint.index import StoredFile, StoredRun, index_of, read_header, read_index
from vitscale.errors import CheckpointError
from vitscale.model import TABLE

VALUES = ("master", "exp_avg", "exp_avg_sq")


def zero_file(sizes, rank, world_size, stage):
    """What a rank of ZeRO writes of parameters of these sizes: a flat stretch of all, or under 3 a piece of each."""
    runs, byte, start = [], 0, 0
    share = -(-sum(sizes.values()) // world_size)
    for name, size in sizes.items():
        piece, first = (-(-size // world_size), 0) if stage == 3 else (share, start)
        low, high = rank * piece - first, (rank + 1) * piece - first
        low, high = max(low, 0), min(high, size)
        for value in VALUES if low < high else ():
            runs.append(StoredRun(name, low, value, high - low, "F32", byte))
            byte += 4 * (high - low)
        start += size
    return StoredFile(1000 + rank, runs)  # headers are not of one length


def unfolded(index):
    """All runs by the rank that wrote them."""
    found = {}
    for name, by_value in index.values.items():
        for value, strides in by_value.items():
            for stride, number in ((s, n) for s in strides for n in range(s.runs)):
                run = StoredRun(name, stride.offset + number * stride.numel, value, *stride[1:3], stride.byte)
                found.setdefault(stride.rank + number, []).append(run)
    return found


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    world_size=st.integers(1, 9),
    stage=st.sampled_from([1, 3]),
)
def test_every_run_is_in_the_index_where_it_was_written(sizes, world_size, stage):
    named = {f"p{number}": size for number, size in enumerate(sizes)}
    files = [zero_file(named, rank, world_size, stage) for rank in range(world_size)]
    index = index_of(files)
    assert index.data_starts == [file.data_start for file in files]
    found = unfolded(index)
    assert {rank: sorted(runs) for rank, runs in found.items()} == {
        rank: sorted(file.runs) for rank, file in enumerate(files) if file.runs
    }
    for strides in (strides for by_value in index.values.values() for strides in by_value.values()):
        assert all(before.end == after.offset for before, after in itertools.pairwise(strides))


def test_the_index_of_a_giant_model_does_not_grow_with_the_ranks():
    shapes = parameter_shapes(TABLE["vit_giant_patch14_224"].variant)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    text = {n: index_of(zero_file(sizes, r, n, 3) for r in range(n)).model_dump_json() for n in (8, 64)}
    assert len(text[64]) < 2 * len(text[8]) < 1_000_000
    headers = sum(len(str(zero_file(sizes, rank, 64, 3))) for rank in range(64))
    assert headers > 20 * len(text[64])


def write(path, header, length=None):
    text = header.encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)


def entry(dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "length", "said"),
    [
        ("no", None, "Expecting value"),
        ("[]", None, "'list' object has no attribute"),
        ("{}", 10**12, "a header of 1000000000000 bytes"),
        (json.dumps({"norm.bias": entry()}), None, "not enough values"),
        (json.dumps({"b|0|master": entry(shape=(1, 2))}), None, "too many values"),
        (json.dumps({"b|0|master": entry(dtype="I64")}), None, r"b\|0\|master is of type I64"),
        (json.dumps({"b|0|master": {}}), None, "shape"),
        (json.dumps({"b|0|master": entry(shape=(-5,))}), None, r"b\|0\|master lies nowhere in it"),
        (json.dumps({"b|0|master": entry(shape=(1 << 70,))}), None, r"b\|0\|master lies nowhere in it"),
        (json.dumps({"b|0|master": entry(shape=(float("inf"),))}), None, "infinity"),
        ("[" * 100_000, None, "recursion"),
    ],
)
def test_a_file_that_is_no_training_state_is_named(tmp_path, header, length, said):
    write(tmp_path / rank_file_name(0), header, length)
    with pytest.raises(CheckpointError, match=rf"rank-00000\.safetensors: not a readable safetensors file .*{said}"):
        write_index(tmp_path, 1)


def test_what_others_note_in_a_header_is_passed_over(tmp_path):
    write(tmp_path / "x", json.dumps({"__metadata__": {"format": "pt"}, "b|3|master": entry()}))
    assert read_header(tmp_path / "x").runs == [StoredRun("b", 3, "master", 2, "F32", 0)]


def manifest(files) -> Manifest:
    return Manifest(
        step=1, generation=1, world_size=1, optimizer_steps=1, cursor={}, config={}, model={}, labels=[],
        shapes={"b": [2]}, metrics={}, versions={}, saved_at="", files=files,
    )  # fmt: skip


def test_the_recorded_index_is_read_and_no_header(tmp_path):
    write(tmp_path / rank_file_name(0), json.dumps({"b|0|master": entry()}))
    found = manifest([record_file(write_index(tmp_path, 1))])
    expected = read_index(tmp_path, manifest([]))
    (tmp_path / rank_file_name(0)).unlink()
    assert read_index(tmp_path, found) == expected
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: not a readable .*No such file"):
        read_index(tmp_path, manifest([]))


def _fail_to_read(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_damaged_or_lost_index_is_refused(tmp_path, monkeypatch):
    write(tmp_path / rank_file_name(0), json.dumps({"b|0|master": entry()}))
    path = write_index(tmp_path, 1)
    found = manifest([record_file(path)])
    path.write_text(path.read_text().replace("[[0,2,", "[[1,2,"))
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: its SHA-256 is not the recorded one"):
        read_index(tmp_path, found)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: not a readable index: .*data_starts"):
        read_index(tmp_path, manifest([record_file(path)]))
    for stride in ([0, 2, "F32", 1, 0, 1], [0, 2, "F32", 0, 0, 2], [0, 0, "F32", 0, 0, 1], [0, 2, "I8", 0, 0, 1],
                   [-1, 2, "F32", 0, 0, 1], [0, 2, "F32", 0, -4, 1], [0, 2, "F32", 0, 1 << 70, 1]):  # fmt: skip
        path.write_text(json.dumps({"data_starts": [80], "values": {"b": {"master": [stride]}}}))
        with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: not a readable index: .*no place in the files of 1"):
            read_index(tmp_path, manifest([record_file(path)]))
    with monkeypatch.context() as patched:
        patched.setattr(type(path), "read_bytes", _fail_to_read)
        with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: cannot be read: Input/output error"):
            read_index(tmp_path, manifest([record_file(path)]))
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: missing"):
        read_index(tmp_path, found)
