"""Fragments on disk: any cut of the parameters is read back into any other."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.checkpoint import Manifest, rank_file_name, read_fragments, stored_weights, write_fragments
from vitscale.engine import MASTER, Fragment
from vitscale.errors import CheckpointError

SHAPES = {"a.weight": [5, 7], "b": [11], "scalar": []}


def manifest(world_size: int) -> Manifest:
    return Manifest(
        step=1, generation=1, world_size=world_size, optimizer_steps=1, cursor={}, config={}, model={}, labels=[],
        shapes=SHAPES, metrics={}, versions={}, saved_at="", files=[],
    )  # fmt: skip


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


@settings(max_examples=40)
@given(saved=FRACTIONS, loaded=FRACTIONS)
def test_any_partition_is_read_into_any_other(tmp_path_factory, saved, loaded):
    directory = tmp_path_factory.mktemp("tag")
    values = truth()
    ranks = cut(values, saved)
    for rank, fragments in enumerate(ranks):
        write_fragments(fragments, directory / rank_file_name(rank))
    zeros = {name: {key: torch.zeros_like(t) for key, t in value.items()} for name, value in values.items()}
    for wanted, expected in zip(cut(zeros, loaded), cut(values, loaded), strict=True):
        read_fragments(wanted, directory, manifest(len(ranks)))
        for got, want in zip(wanted, expected, strict=True):
            assert all(torch.equal(got.values[key], want.values[key]) for key in want.values)
    whole = stored_weights(directory, manifest(len(ranks)))
    assert {name: list(t.shape) for name, t in whole.items()} == SHAPES
    assert all(torch.equal(whole[name].view(-1), values[name][MASTER]) for name in SHAPES)


def test_replicas_are_written_once(tmp_path):
    fragment = Fragment("b", 0, {MASTER: torch.ones(11)}, saved_here=False)
    write_fragments([fragment], tmp_path / rank_file_name(0))
    with pytest.raises(CheckpointError, match="holds 0 of the 11 elements wanted of b"):
        read_fragments([fragment], tmp_path, manifest(1))


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    (tmp_path / rank_file_name(0)).write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: not a readable safetensors file"):
        stored_weights(tmp_path, manifest(1))


def test_values_that_were_never_stored_are_missed_by_name(tmp_path):
    write_fragments(cut(truth(), [])[0], tmp_path / rank_file_name(0))
    with pytest.raises(CheckpointError, match="holds no ema weights: use --weights raw"):
        stored_weights(tmp_path, manifest(1), "ema")


def test_a_stored_average_is_read_in_place_of_the_weights(tmp_path):
    values = truth()
    average = {name: {"ema": value[MASTER] / 2} | value for name, value in values.items()}
    write_fragments(cut(average, [])[0], tmp_path / rank_file_name(0))
    found = stored_weights(tmp_path, manifest(1), "ema")
    assert all(torch.equal(found[name].view(-1), values[name][MASTER] / 2) for name in SHAPES)
