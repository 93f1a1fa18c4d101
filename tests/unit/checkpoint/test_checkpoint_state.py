"""Fragments on disk: any cut of the parameters is read back into any other."""

import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.checkpoint import (
    Manifest,
    rank_file_name,
    read_fragments,
    record_file,
    state,
    stored_weights,
    write_fragments,
    write_index,
)
from vitscale.engine import MASTER, Fragment
from vitscale.errors import CheckpointError

SHAPES = {"a.weight": [5, 7], "b": [11], "scalar": []}


def manifest(world_size: int, files=()) -> Manifest:
    return Manifest(
        step=1, generation=1, world_size=world_size, optimizer_steps=1, cursor={}, config={}, model={}, labels=[],
        shapes=SHAPES, metrics={}, versions={}, saved_at="", files=list(files),
    )  # fmt: skip


def saved(ranks, directory, indexed=True) -> Manifest:
    """The ranks' files, written, and the manifest that goes with them."""
    for rank, fragments in enumerate(ranks):
        write_fragments(fragments, directory / rank_file_name(rank))
    return manifest(len(ranks), [record_file(write_index(directory, len(ranks)))] if indexed else [])


def truth() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    flat = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    return {n: {key: torch.randn(k, generator=generator) for key in (MASTER, "exp_avg")} for n, k in flat.items()}


def cut(values: dict[str, dict[str, torch.Tensor]], cuts: list[float]) -> list[list[Fragment]]:
    """The flattened parameters laid end to end and cut at fractions, one piece a rank."""
    total = sum(v[MASTER].numel() for v in values.values())
    edges = [0, *sorted(round(c * total) for c in cuts), total]
    ranks = []
    for low, high in itertools.pairwise(edges):
        fragments, start = [], 0
        for name, value in values.items():
            end = start + value[MASTER].numel()
            a, b = max(low, start), min(high, end)
            if a < b:
                pieces = {key: t[a - start : b - start].clone() for key, t in value.items()}
                fragments.append(Fragment(name, a - start, pieces, True))
            start = end
        ranks.append(fragments)
    return ranks


FRACTIONS = st.lists(st.floats(0, 1), max_size=4)


def zeros(values):
    return {name: {key: torch.zeros_like(t) for key, t in value.items()} for name, value in values.items()}


@settings(max_examples=60)
@given(cuts=FRACTIONS, others=FRACTIONS, indexed=st.booleans())
def test_any_partition_is_read_into_any_other(tmp_path_factory, cuts, others, indexed):
    directory = tmp_path_factory.mktemp("tag")
    values = truth()
    found = saved(cut(values, cuts), directory, indexed)
    for wanted, expected in zip(cut(zeros(values), others), cut(values, others), strict=True):
        read_fragments(wanted, directory, found)
        for got, want in zip(wanted, expected, strict=True):
            assert all(torch.equal(got.values[key], want.values[key]) for key in want.values)
    whole = stored_weights(directory, found)
    assert {name: list(t.shape) for name, t in whole.items()} == SHAPES
    assert all(torch.equal(whole[name].view(-1), values[name][MASTER]) for name in SHAPES)


def test_only_the_files_with_something_wanted_are_opened_once_and_read_forwards(tmp_path, monkeypatch):
    values = truth()
    found = saved(cut(values, [0.25, 0.5, 0.75]), tmp_path)
    reads = []

    class Watched(io.FileIO):
        def __init__(self, path):
            super().__init__(path)
            reads.append((path.name, []))

    read_bytes = state._read_bytes

    def watched(file, byte, target):
        reads[-1][1].append(byte)
        read_bytes(file, byte, target)

    monkeypatch.setattr(state, "FileIO", Watched)
    monkeypatch.setattr(state, "_read_bytes", watched)
    read_fragments(cut(zeros(values), [0.4, 0.7])[1], tmp_path, found)  # lies in the second and the third quarter
    assert [name for name, _ in reads] == [rank_file_name(1), rank_file_name(2)]
    assert all(len(places) >= 2 and places == sorted(places) for _, places in reads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_that_cannot_take_the_files_bytes_are_filled_through_the_buffer(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(state, "_HOST_BUFFER_BYTES", 16)  # a few elements a turn
    value = torch.randn(11, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = saved(
        [[Fragment("b", 0, {MASTER: value[:5]}, True)], [Fragment("b", 5, {MASTER: value[5:]}, True)]], tmp_path
    )
    strided, wide = torch.zeros(22, dtype=dtype)[::2], torch.zeros(11, dtype=torch.float64)
    for target in (strided, wide):
        read_fragments([Fragment("b", 0, {MASTER: target}, True)], tmp_path, found)
        assert torch.equal(target, value.to(target.dtype))


@pytest.mark.parametrize("indexed", [True, False])
def test_a_file_that_was_cut_off_is_named(tmp_path, indexed):
    values = truth()
    found = saved(cut(values, [0.5]), tmp_path, indexed)
    path = tmp_path / rank_file_name(1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: ends at byte \d+, in the midst of the state"):
        read_fragments(cut(zeros(values), [])[0], tmp_path, found)


def test_a_file_that_is_gone_is_named(tmp_path):
    values = truth()
    found = saved(cut(values, [0.5]), tmp_path)
    (tmp_path / rank_file_name(1)).unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: cannot be read: No such file"):
        read_fragments(cut(zeros(values), [])[0], tmp_path, found)


def test_replicas_are_written_once(tmp_path):
    fragment = Fragment("b", 0, {MASTER: torch.ones(11)}, saved_here=False)
    found = saved([[fragment]], tmp_path)
    with pytest.raises(CheckpointError, match="holds 0 of the 11 elements wanted of b"):
        read_fragments([fragment], tmp_path, found)


def test_values_that_were_never_stored_are_missed_by_name(tmp_path):
    found = saved(cut(truth(), []), tmp_path)
    with pytest.raises(CheckpointError, match="holds no ema weights: use --weights raw"):
        stored_weights(tmp_path, found, "ema")


def test_a_stored_average_is_read_in_place_of_the_weights(tmp_path):
    values = truth()
    average = {name: {"ema": value[MASTER] / 2} | value for name, value in values.items()}
    found = stored_weights(tmp_path, saved(cut(average, []), tmp_path), "ema")
    assert all(torch.equal(found[name].view(-1), values[name][MASTER] / 2) for name in SHAPES)
