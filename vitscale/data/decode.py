"""From a sample's bytes to pixels: decode, crop, resize. Pixels are uint8 RGB tensors [3, H, W].

JPEG goes through libjpeg-turbo, which gives Pillow's very pixels faster, or, where TurboJPEG 3 is at hand,
only the part that a crop needs; the rest goes through Pillow. What an image is, its first bytes say, not its
name. EXIF rotation is not applied.
"""

import io
import struct
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vitscale.data import turbojpeg

Interpolation = Literal["bilinear", "bicubic"]

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
        except (ValueError, KeyError):  # damaged, or chroma sampled in a way that simplejpeg has no name for
            width, height = _open_with_pillow(data, image_format).size
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
    return _as_image(_decode_jpeg(data) if image_format == "jpeg" else _decode_with_pillow(data, image_format))


def decode_crop(
    data: bytes,
    box: Box | Callable[[int, int], Box],
    size_px: int,
    interpolation: Interpolation,
    *,
    scaled: bool = False,
) -> Tensor:
    """Decode no more than a crop needs and resize it; the pixels are those of `crop_resize(decode(data), ...)`.

    Args:
        data: the file. Where TurboJPEG 3 is used, damage below the box goes unnoticed; a checksum of the
            bytes or `decode` finds it.
        box: what to cut out, or a function of the image's height and width that tells.
        size_px: side of the result.
        interpolation: with antialiasing, like Pillow's.
        scaled: let the JPEG decoder halve the image, up to three times, while the box stays at least
            `size_px` high and wide. Faster for large images, but the pixels differ: for training only.

    Returns:
        uint8 RGB [3, size_px, size_px]; in memory the channels come last.

    Raises:
        BadSample: as `decode`.
    """
    image_format, width, height = probe(data)
    if callable(box):
        box = box(height, width)
    if image_format != "jpeg":
        return crop_resize(_as_image(_decode_with_pillow(data, image_format)), box, size_px, interpolation)
    reduction = _reduction(box, size_px) if scaled else 1
    return _resize(_as_image(_decode_part(data, height, width, box, reduction)), (size_px, size_px), interpolation)


def crop_resize(image: Tensor, box: Box, size_px: int, interpolation: Interpolation) -> Tensor:
    """Cut the box out of a uint8 image [3, H, W] and resize it to [3, size_px, size_px] with antialiasing."""
    crop = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return _resize(crop, (size_px, size_px), interpolation)


def resize_centre(image: Tensor, size_px: int, crop_fraction: float, interpolation: Interpolation) -> Tensor:
    """Evaluation's view of a uint8 image [3, H, W], by the rule and the rounding that timm and torchvision share.

    The shorter side is resized to `size_px / crop_fraction`, rounded down, then the central square is cut out.
    Of an image longer than 32 times its width (or the reverse) only the middle is resized, because what such
    an image grows to knows no bound; its grid may then lie half a pixel beside theirs.

    Returns:
        uint8 [3, size_px, size_px].
    """
    _, height, width = image.shape
    longest = 32 * min(height, width)
    image = _centre(image, min(height, longest), min(width, longest))
    _, height, width = image.shape
    short = int(size_px / crop_fraction)
    scaled = (short, short * width // height) if height <= width else (short * height // width, short)
    return _centre(_resize(image, scaled, interpolation), size_px, size_px)


def _decode_part(data: bytes, height: int, width: int, box: Box, reduction: int) -> NDArray[np.uint8]:
    """The box of a JPEG of height x width pixels, both divided by `reduction`: [h, w, 3]."""
    top, left, bottom, right = (
        (edge + reduction // 2) // reduction for edge in (box.top, box.left, box.top + box.height, box.left + box.width)
    )
    library = turbojpeg.find()
    if library is not None:
        part = library.decode(data, top, left, bottom - top, right - left, reduction=reduction)
        if part is not None:
            return part
    return _decode_jpeg(data, height, width, reduction)[top:bottom, left:right]


def _reduction(box: Box, size_px: int) -> int:
    """The largest of 8, 4, 2 and 1 that leaves the box at least `size_px` high and wide."""
    return next((r for r in (8, 4, 2) if min(box.height, box.width) >= r * size_px), 1)


def _decode_jpeg(data: bytes, height: int = 0, width: int = 0, reduction: int = 1) -> NDArray[np.uint8]:
    """A whole JPEG; to reduce it takes its height and width in pixels too."""
    least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, strict=True, **least)
    except ValueError as error:
        if "subsampling" in str(error):  # a sampling that TurboJPEG has no name for; libjpeg itself can do it
            return _decode_with_pillow(data, "jpeg", reduction)
        raise BadSample(f"jpeg: {error}") from None
    return pixels


def _decode_with_pillow(data: bytes, image_format: str, reduction: int = 1) -> NDArray[np.uint8]:
    image = _open_with_pillow(data, image_format)
    try:
        if image.mode.startswith("I;16"):
            # Pillow would clip: all but the darkest greys would come out white.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that transparency is lost
            return np.array(image.convert("RGB").reduce(reduction))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise BadSample(f"{image_format}: {error}") from None


def _as_image(pixels: NDArray[np.uint8]) -> Tensor:
    """[H, W, 3] as [3, H, W], without a copy."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    # Half a pixel is rounded to even, as torchvision does.
    top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]


def _resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    # The vector code wants densely packed pixels; handed a view, torch takes twice as long. The batch comes before the
    # channels go first: the other way round torch does not see that they come last, and gives them back first.
    packed = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(packed, size=size, mode=interpolation, antialias=True)[0]


def _open_with_pillow(data: bytes, image_format: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images from another size on than `probe` refuses them.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=[image_format])
    except UnidentifiedImageError:  # its message names an address in memory
        raise BadSample(f"{image_format} header: damaged or truncated") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadSample(f"{image_format} header: {error}") from None
