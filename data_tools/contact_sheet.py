"""A contact sheet: samples in a grid, each with its class, wnid and size under it."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from data_tools.pictures import THUMBNAIL_PX, Picture
from data_tools.quantities import byte_size

COLUMNS = 8
CELL_PX = THUMBNAIL_PX
GAP_PX = 16
MARGIN_PX = 32
LINE_PX = 22
FONT_PX = 16
TITLE_PX = 28
FAULT_LETTERS, FAULT_LINES = 22, 8

PAPER, MOUNT, INK, FAINT_INK, ALARM = "#ffffff", "#eef0f2", "#16191d", "#5c646e", "#b3261e"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_contact_sheet(title: str, pictures: Sequence[Picture]) -> Image.Image:
    """Draw the pictures in rows of COLUMNS, under a title."""
    columns = min(COLUMNS, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    row_px = CELL_PX + 3 * LINE_PX + GAP_PX + 8
    top = MARGIN_PX + TITLE_PX + GAP_PX
    width = 2 * MARGIN_PX + columns * CELL_PX + (columns - 1) * GAP_PX
    sheet = Image.new("RGB", (width, top + rows * row_px + MARGIN_PX - GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    title_font = ImageFont.load_default(TITLE_PX)
    draw.text((MARGIN_PX, MARGIN_PX - 6), fitting(title, title_font, width - 2 * MARGIN_PX), INK, title_font)
    font = ImageFont.load_default(FONT_PX)
    for place, picture in enumerate(pictures):
        left = MARGIN_PX + place % columns * (CELL_PX + GAP_PX)
        _draw_cell(sheet, draw, (left, top + place // columns * row_px), picture, font)
    return sheet


def caption(picture: Picture) -> tuple[str, str, str]:
    """What stands under a picture: its class, wnid, and size, in pixels only where the index knows it."""
    # Pillow's own font has no sign for "times".
    area = f"{picture.width_px} x {picture.height_px} px, " if picture.width_px else ""
    return picture.name, picture.wnid, area + byte_size(picture.size_bytes)


def fitting(text: str, font: Font, width_px: int) -> str:
    """As much of the text as fits into the width, with an ellipsis where some is missing."""
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(f"{text}...") > width_px:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], picture: Picture, font: Font
) -> None:
    left, top = corner
    draw.rectangle((left, top, left + CELL_PX - 1, top + CELL_PX - 1), MOUNT)
    if picture.image is None:
        fault = "\n".join(textwrap.wrap(f"cannot be read: {picture.fault}", FAULT_LETTERS)[:FAULT_LINES])
        draw.multiline_text((left + GAP_PX, top + GAP_PX), fault, ALARM, font)
    else:
        image = picture.image
        sheet.paste(image, (left + (CELL_PX - image.width) // 2, top + (CELL_PX - image.height) // 2))
    for number, line in enumerate(caption(picture)):
        place = (left, top + CELL_PX + 6 + number * LINE_PX)
        draw.text(place, fitting(line, font, CELL_PX), FAINT_INK if number else INK, font)
