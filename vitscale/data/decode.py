"""From a sample's bytes to pixels: decode, crop, resize. Pixels are uint8 RGB tensors [3, H, W].

JPEG goes through libjpeg-turbo, which gives Pillow's very pixels about twice as fast; the rest goes through
Pillow. What an image is, its first bytes say, not its name. EXIF rotation is not applied.
"""

import io
import struct
import warnings
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Larger images are refused before they are decoded: at 3 bytes a pixel this one takes 240 MB.
MAX_IMAGE_PIXELS = 80_000_000

_MAGIC = {
    "jpeg": (b"\xff\xd8\xff",),
    "png": (b"\x89PNG\r\n\x1a\n",),
    "gif": (b"GIF87a", b"GIF89a"),
    "bmp": (b"BM",),
    "tiff": (b"II*\0", b"MM\0*"),
}


class BadSample(Exception):  # noqa: N818 (it names the sample's state; training goes on)
    """A sample whose bytes are not a readable image; the message is the reason."""


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def sniff(data: bytes) -> str | None:
    """Format that the first bytes tell: jpeg, png, webp, gif, bmp or tiff; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for name, starts in _MAGIC.items() if data.startswith(starts)), None)


def probe(data: bytes) -> tuple[str, int, int]:
    """Format, width and height in pixels, from the header alone.

    Raises:
        BadSample: not an image, a header that cannot be read, or more than MAX_IMAGE_PIXELS.
    """
    image_format = sniff(data)
    if image_format is None:
        raise BadSample(f"not an image (its bytes begin with {data[:4].hex(' ') or 'nothing'})")
    if image_format == "jpeg":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise BadSample(f"jpeg header: {error}") from None
    else:
        width, height = _open_with_pillow(data, image_format).size
    if width * height > MAX_IMAGE_PIXELS:
        raise BadSample(f"{width} x {height} pixels are over the limit of {MAX_IMAGE_PIXELS}")
    return image_format, width, height


def decode(data: bytes) -> Tensor:
    """Decode to uint8 RGB [3, H, W]. Animations give their first frame, transparency is dropped.

    Raises:
        BadSample: not an image, truncated, damaged, or more than MAX_IMAGE_PIXELS.
    """
    image_format, _, _ = probe(data)
    if image_format == "jpeg":
        try:
            pixels = simplejpeg.decode_jpeg(data, strict=True)
        except ValueError as error:
            raise BadSample(f"jpeg: {error}") from None
    else:
        try:
            pixels = np.array(_open_with_pillow(data, image_format).convert("RGB"))
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            raise BadSample(f"{image_format}: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def crop_resize(image: Tensor, box: Box, size_px: int, interpolation: Literal["bilinear", "bicubic"]) -> Tensor:
    """Cut the box out of a uint8 image [3, H, W] and resize it to [3, size_px, size_px] with antialiasing."""
    crop = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return F.interpolate(crop[None], size=(size_px, size_px), mode=interpolation, antialias=True)[0]


def centre_box(height: int, width: int, crop_fraction: float) -> Box:
    """The central square of an evaluation image: its side is `crop_fraction` of the shorter side.

    Cutting it out and resizing once is the usual "resize the shorter side to size / crop_fraction, then cut
    out the central size x size" without the pixels that would be thrown away.
    """
    side = max(1, round(crop_fraction * min(height, width)))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def _open_with_pillow(data: bytes, image_format: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images from another size on than `probe` refuses them.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=[image_format])
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadSample(f"{image_format} header: {error}") from None
