import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitscale.telemetry import Prediction, draw_attention, draw_predictions, draw_similarity
from vitscale.telemetry.drawing import _colours

RIGHT, WRONG = (20, 120, 60), (190, 30, 30)
DARKEST, BRIGHTEST = (68, 1, 84), (253, 231, 37)


def pixels_of(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has(pixels, colour):
    return (pixels == colour).all(axis=-1).any()


def squares(count, size_px):
    """Images of one colour each."""
    shades = np.arange(count, dtype=np.uint8)[:, None, None, None] * 5 + 40
    return np.broadcast_to(shades, (count, size_px, size_px, 3))


def test_every_image_is_in_the_grid_with_its_frame():
    predictions = [Prediction("crane", "crane" if index % 3 else "drake", 0.5, index % 3 != 0) for index in range(11)]
    sheet = pixels_of(draw_predictions(squares(11, 32), predictions))
    assert sheet.shape == (2 * (128 + 2 * 15 + 8) + 8, 8 * 136 + 8, 3)
    for index, prediction in enumerate(predictions):
        y, x = 8 + index // 8 * 166, 8 + index % 8 * 136
        assert (sheet[y : y + 128, x : x + 128] == index * 5 + 40).all()
        assert tuple(sheet[y - 1, x + 64]) == (RIGHT if prediction.right else WRONG)
        below = sheet[y + 130 : y + 160, x : x + 128]
        assert has(below, RIGHT) == prediction.right
        assert has(below, WRONG) != prediction.right


def test_a_long_name_is_cut_and_its_probability_stays():
    image = squares(1, 300)
    short, long, longer = (
        pixels_of(draw_predictions(image, [Prediction("a", name, 0.97, True)]))
        for name in (
            "cat",
            "a name that is far too long for it",
            "a name that is far too long for it, and longer still",
        )
    )
    assert short.shape == long.shape
    assert (long == longer).all()
    assert (short != long).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.sampled_from([1, 7, 128, 129, 224]), st.text(max_size=40), st.floats(0, 1))
def test_any_count_size_and_name_can_be_drawn(count, size_px, name, probability):
    png = draw_predictions(squares(count, size_px), [Prediction(name, name, probability, True)] * count)
    assert pixels_of(png).shape[1] == min(count, 8) * 136 + 8


def test_attention_is_bright_where_the_model_looks():
    attention = np.full((1, 2, 4, 4), 0.01, dtype=np.float32)
    attention[0, 0, 1, 2] = attention[0, 1, 3, 0] = 0.5
    sheet = pixels_of(draw_attention(squares(1, 32), attention))
    assert sheet.shape == (15 + 8 + 136, 4 * 136 + 8, 3)
    top = 15 + 4
    for head, (row, column) in enumerate([(1, 2), (3, 0)]):
        left = 8 + (2 + head) * 136
        block = sheet[top : top + 128, left : left + 128]
        bright = (block == BRIGHTEST).all(axis=-1)
        assert bright[row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32].all()
        assert bright.sum() == 32 * 32
        assert has(block, DARKEST)


def test_attention_that_is_everywhere_the_same_can_be_drawn():
    draw_attention(squares(2, 8), np.zeros((2, 9, 3, 5), dtype=np.float32))


def test_similarity_shows_every_position_s_cosine_with_all_others():
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(3, 4, 6)).astype(np.float32)
    sheet = pixels_of(draw_similarity(embedding))
    cell_px = 900 // 16
    assert sheet.shape == (3 * (3 * cell_px + 2) + 2, 4 * (4 * cell_px + 2) + 2, 3)
    for row, column, other_row, other_column in [(0, 0, 2, 3), (1, 2, 1, 2), (2, 3, 0, 1)]:
        one, other = embedding[row, column], embedding[other_row, other_column]
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        y = 2 + row * (3 * cell_px + 2) + other_row * cell_px
        x = 2 + column * (4 * cell_px + 2) + other_column * cell_px
        cell = sheet[y : y + cell_px, x : x + cell_px].reshape(-1, 3)
        assert (cell == cell[0]).all()
        assert cell[0] == pytest.approx(_colours(np.float64((cosine + 1) / 2)), abs=1)


@pytest.mark.parametrize(("side", "maps", "first"), [(16, 16, 0), (24, 12, 1), (37, 12, 1)])
def test_of_a_large_grid_maps_are_left_out(side, maps, first):
    embedding = np.random.default_rng(0).normal(size=(side, side, 8)).astype(np.float32)
    sheet = pixels_of(draw_similarity(embedding))
    cell_px = 900 // (maps * side)
    assert sheet.shape[0] == sheet.shape[1] == maps * (side * cell_px + 2) + 2 < 950
    # In the first map it is its own position that is alike.
    alike = 2 + first * cell_px
    assert tuple(sheet[alike, alike]) == BRIGHTEST


def test_similarity_of_zeros_is_no_error():
    draw_similarity(np.zeros((2, 2, 4), dtype=np.float32))


def test_colours_go_from_dark_to_light():
    ends = _colours(np.array([0.0, 0.5, 1.0]))
    assert [tuple(colour) for colour in ends] == [DARKEST, (33, 145, 140), BRIGHTEST]
    luma = _colours(np.linspace(0, 1, 101)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(luma) > -0.5).all()
