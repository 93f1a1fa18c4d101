"""Pictures of what a model sees, drawn with Pillow and numpy alone: arrays in, PNG files out."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_CELL_PX, _GAP_PX, _LINE_PX, _FONT_PX = 128, 8, 15, 12
_COLUMNS = 8
_PAPER, _INK, _RIGHT, _WRONG = (255, 255, 255), (30, 30, 30), (20, 120, 60), (190, 30, 30)
# From dark to light over blue and green, as even to the eye as five colours allow.
_SCALE = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
_HEADS = 6
_SIMILARITY_PX, _SIMILARITY_MAPS = 900, 16

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image, beside the truth."""

    truth: str
    guess: str
    probability: float
    """Of the guess, 0 to 1."""
    right: bool


def draw_predictions(images: Pixels, predictions: Sequence[Prediction]) -> bytes:
    """A grid of images [N, height, width, 3], each with its class, and the class and probability that the model gives.

    Wrong ones are framed and written in red, right ones in green.
    """
    columns = min(len(images), _COLUMNS)
    rows = -(-len(images) // columns)
    pitch_x, pitch_y = _CELL_PX + _GAP_PX, _CELL_PX + 2 * _LINE_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * pitch_x + _GAP_PX, rows * pitch_y + _GAP_PX), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_PX)
    for index, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        x, y = _GAP_PX + index % columns * pitch_x, _GAP_PX + index // columns * pitch_y
        colour = _RIGHT if prediction.right else _WRONG
        sheet.paste(_cell(image), (x, y))
        draw.rectangle((x - 2, y - 2, x + _CELL_PX + 1, y + _CELL_PX + 1), outline=colour, width=2)
        word = "right" if prediction.right else "wrong"
        _write(draw, (x, y + _CELL_PX + 2), prediction.truth, "", _INK, font)
        end = f" {prediction.probability:.0%}"
        _write(draw, (x, y + _CELL_PX + 2 + _LINE_PX), f"{word}: {prediction.guess}", end, colour, font)
    return _png(sheet)


def draw_attention(images: Pixels, attention: NDArray[np.float32]) -> bytes:
    """A row for each image [N, height, width, 3]: itself, the mean over heads laid over it, and the first heads alone.

    Args:
        images: pixels.
        attention: [N, H, rows, columns]; each map is scaled to its own range.
    """
    heads = min(attention.shape[1], _HEADS)
    pitch = _CELL_PX + _GAP_PX
    sheet = Image.new("RGB", ((2 + heads) * pitch + _GAP_PX, len(images) * pitch + _LINE_PX + _GAP_PX), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    for column, title in enumerate(["image", "mean of heads", *(f"head {head}" for head in range(heads))]):
        draw.text((_GAP_PX + column * pitch, 1), title, fill=_INK, font=font)
    for row, (image, maps) in enumerate(zip(images, attention, strict=True)):
        y = _LINE_PX + _GAP_PX // 2 + row * pitch
        cell = _cell(image)
        mean = _coloured(maps.mean(axis=0))
        cells = [cell, Image.blend(cell, _scaled(mean), 0.6), *(_scaled(_coloured(one)) for one in maps[:heads])]
        for column, shown in enumerate(cells):
            sheet.paste(shown, (_GAP_PX + column * pitch, y))
    return _png(sheet)


def draw_similarity(embedding: NDArray[np.float32]) -> bytes:
    """Cosine similarity of position embeddings [rows, columns, D]: at each position a map of all, from -1 to 1.

    Of a grid longer than 16 only every second, third, ... row and column has a map, so that the picture stays small.
    A trained embedding is alike near by and along rows and columns (Dosovitskiy et al. 2021, figure 7).
    """
    rows, columns, _ = embedding.shape
    unit = embedding / np.maximum(np.linalg.norm(embedding, axis=-1, keepdims=True), 1e-12)
    stride = -(-max(rows, columns) // _SIMILARITY_MAPS)
    shown_at = unit[stride // 2 :: stride, stride // 2 :: stride]
    cosine = np.einsum("abd,cxd->abcx", shown_at, unit)
    cell_px = max(1, _SIMILARITY_PX // (max(cosine.shape[:2]) * max(rows, columns)))
    tile = (rows * cell_px + 2, columns * cell_px + 2)  # with a line between maps
    down, across = cosine.shape[:2]
    sheet = np.full((down * tile[0] + 2, across * tile[1] + 2, 3), _PAPER, dtype=np.uint8)
    for row, column in np.ndindex(down, across):
        shown = _colours((cosine[row, column] + 1.0) / 2.0).repeat(cell_px, axis=0).repeat(cell_px, axis=1)
        y, x = 2 + row * tile[0], 2 + column * tile[1]
        sheet[y : y + shown.shape[0], x : x + shown.shape[1]] = shown
    return _png(Image.fromarray(sheet))


def _colours(values: NDArray[np.floating]) -> Pixels:
    """Colours [..., 3] of values between 0 and 1."""
    places = np.linspace(0.0, 1.0, len(_SCALE))
    return (
        np.stack([np.interp(values, places, _SCALE[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)
    )


def _coloured(values: NDArray[np.floating]) -> Pixels:
    low, high = float(values.min()), float(values.max())
    return _colours((values - low) / (high - low) if high > low else np.zeros_like(values))


def _scaled(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels).resize((_CELL_PX, _CELL_PX), Image.Resampling.NEAREST)


def _cell(pixels: Pixels) -> Image.Image:
    """An image at the size of a cell; of a small one its pixels stay visible."""
    small = max(pixels.shape[:2]) <= _CELL_PX
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((_CELL_PX, _CELL_PX), method)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    end: str,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """One line no wider than a cell; a long text is cut before its end."""
    shown = text
    while font.getlength(shown + end) > _CELL_PX and text:
        text = text[:-1]
        shown = text.rstrip() + "..."
    draw.text(place, shown + end, fill=colour, font=font)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
