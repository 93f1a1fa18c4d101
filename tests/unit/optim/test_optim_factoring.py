"""Factors of whole parameters from runs of their elements."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.model import create_model
from vitscale.optim.factoring import Factoring, attention_shapes, block_of, factoring


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1664,), None),
        ((), None),
        ((8192, 1664), Factoring(1, 8192, 1, 1664, 1)),
        ((21843, 31), None),
        ((1, 257, 1280), Factoring(1, 257, 1, 1280, 1)),  # position embedding
        ((1, 1, 1280), None),  # class token
        ((1408, 3, 14, 14), None),  # a /14 patch embedding
        ((768, 3, 32, 32), Factoring(1, 768, 96, 32, 1)),  # a /32 one: over outputs and the last dimension
        ((256, 64, 3, 3), Factoring(1, 256, 1, 64, 9)),  # a convolution of the hybrids' stem
        ((3, 16, 104, 1664), Factoring(48, 104, 1, 1664, 1)),  # queries, keys and values of ViT-G, by head
        ((1664, 16, 104), Factoring(1, 1664, 16, 104, 1)),  # their projection
    ],
)
def test_what_is_factored(shape, expected):
    assert factoring(shape) == expected


SHAPES = [(3, 2, 33, 37), (37, 2, 33), (40, 33), (33, 3, 40, 2), (2, 32, 3, 34, 2)]


@settings(max_examples=60)
@given(shape=st.sampled_from(SHAPES), cuts=st.lists(st.floats(0, 1), max_size=3))
def test_runs_give_the_means_of_the_whole_and_are_scaled_by_its_factors(shape, cuts):
    whole = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    how = factoring(shape)
    view = whole.view(how)
    rows, cols = torch.zeros(how.row_shape), torch.zeros(how.col_shape)
    rows, cols = rows.double().view(-1), cols.double().view(-1)
    scaled = []
    edges = [0, *sorted(round(cut * whole.numel()) for cut in cuts), whole.numel()]
    for start, end in itertools.pairwise(edges):
        if start == end:
            continue
        block, run = block_of(how, start, end - start), whole.view(-1)[start:end]
        folded = block.fold(run)
        assert folded.count_nonzero() == end - start
        assert torch.equal(block.unfold(folded), run)
        block.rows_of(rows).add_(folded.sum(3))
        block.cols_of(cols).add_(folded.sum(1))
        scaled.append(block.unfold(folded * block.rows_of(rows.new_ones(rows.numel()) * 2).unsqueeze(3)))
    torch.testing.assert_close(rows.view(how.row_shape), view.sum(3))
    torch.testing.assert_close(cols.view(how.col_shape), view.sum(1))
    assert torch.equal(torch.cat(scaled), 2 * whole.view(-1))


@pytest.mark.parametrize("pool", ["token", "map"])
def test_attention_has_a_dimension_for_matrices_and_heads(pool):
    model = create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=32, embed_dim=12, depth=2, num_heads=3, pool=pool
    )
    expected = {f"blocks.{i}.attn.qkv.weight": (3, 3, 4, 12) for i in range(2)}
    expected |= {f"blocks.{i}.attn.proj.weight": (12, 3, 4) for i in range(2)}
    if pool == "map":
        expected |= {
            "attn_pool.q.weight": (1, 3, 4, 12),
            "attn_pool.kv.weight": (2, 3, 4, 12),
            "attn_pool.proj.weight": (12, 3, 4),
        }
    shapes = attention_shapes(model)
    assert shapes == expected
    numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert all(math.prod(shape) == numel[name] for name, shape in shapes.items())
