"""From the bytes of a source to the bytes of a shard: unpacked, tested, and made smaller or faster on request.

What is not asked for does not happen: by default an image passes as it is, down to its last byte. What an image is,
its first bytes say, not its name. Where pixels are written anew they are those that training would have seen: RGB,
the first frame of an animation, without transparency, colour profile or EXIF rotation (none of them is applied, and
the metadata is dropped). The result depends on bytes and settings alone.
"""

import io
import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_tools.jpeg_rewrite import require_library, to_baseline
from vitscale.data.decode import BadSample, decode, probe
from vitscale.errors import ConfigError

Check = Literal["decode", "header"]
Reencode = Literal["never", "baseline"] | int

# Quality of images that are made smaller, unless --reencode names one.
RESIZED_QUALITY = 95

# The largest image is 80 MP; a gzip stream that unpacks to more than this is no photograph.
MAX_UNPACKED_BYTES = 256 << 20

# libjpeg shrinks an image almost for nothing, but coarsely: it may go down to this times the wanted size, a true
# resize does the rest. The result is 51 dB from that of a resize alone, the JPEG made of it only 36 dB.
REDUCING_GAP = 2

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Preparation:
    """What is done to every image.

    Args:
        check: decode the whole image, or read its header alone, which misses truncated files.
        max_short_edge: larger images are resized so that their shorter side has this many pixels.
        reencode: "never"; "baseline" rewrites progressive JPEGs without loss; a number is the JPEG quality (1 to
            100) that every image is encoded to, 4:2:0.
    """

    check: Check = "decode"
    max_short_edge: int | None = None
    reencode: Reencode = "never"

    def require(self) -> None:
        """Find out before any work what the settings need.

        Raises:
            ConfigError: baseline is asked for and libturbojpeg is missing.
        """
        if self.reencode == "baseline":
            require_library()


class Prepared(NamedTuple):
    """An image as it goes into a shard: bytes, format, and size in pixels."""

    data: bytes
    format: str
    width: int
    height: int


def parse_reencode(words: str) -> Reencode:
    """The value of --reencode.

    Raises:
        ConfigError: neither never, baseline nor a quality.
    """
    if words == "never":
        return "never"
    if words == "baseline":
        return "baseline"
    if words.isdecimal() and 1 <= int(words) <= 100:
        return int(words)
    raise ConfigError(f"--reencode {words}: give never, baseline or a JPEG quality from 1 to 100")


def prepare(data: bytes, settings: Preparation) -> Prepared:
    """Test an image and change it as the settings ask.

    Raises:
        BadSample: not a readable image; the message is the reason.
    """
    data = unpack(data)
    image_format, width, height = probe(data)
    if settings.max_short_edge is not None and min(width, height) > settings.max_short_edge:
        quality = settings.reencode if isinstance(settings.reencode, int) else RESIZED_QUALITY
        return _encode(_resize(data, image_format, settings.max_short_edge), quality)
    if isinstance(settings.reencode, int):
        return _encode(_pixels(data), settings.reencode)
    if settings.check == "decode":
        check_image(data)
    if settings.reencode == "baseline" and image_format == "jpeg":
        data = to_baseline(data)
    return Prepared(data, image_format, width, height)


def unpack(data: bytes) -> bytes:
    """The image inside a gzip stream; other bytes pass.

    Raises:
        BadSample: a damaged stream, or one that unpacks to more than MAX_UNPACKED_BYTES.
    """
    if not data.startswith(_GZIP_MAGIC):
        return data
    stream = zlib.decompressobj(wbits=31)
    try:
        unpacked = stream.decompress(data, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise BadSample(f"gzip: {error}") from None
    if not stream.eof:
        whole = "truncated" if len(unpacked) < MAX_UNPACKED_BYTES else f"unpacks to over {MAX_UNPACKED_BYTES} bytes"
        raise BadSample(f"gzip: {whole}")
    return unpacked


def check_image(data: bytes) -> None:
    """Find out whether `decode` would take an image, in two thirds of its time.

    Whatever can be wrong with a JPEG shows in its entropy-coded data, so a grey image of an eighth of the size,
    which leaves out most of the rest of the work, is as good a test as the whole one.

    Raises:
        BadSample: as `decode`.
    """
    image_format, _, _ = probe(data)
    if image_format == "jpeg":
        try:
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=True)
            return
        except ValueError:
            pass  # a rare kind of JPEG, or a bad one: decode tells
    decode(data)


def _pixels(data: bytes) -> NDArray[np.uint8]:
    """RGB [H, W, 3]."""
    pixels: NDArray[np.uint8] = decode(data).permute(1, 2, 0).numpy()
    return pixels


def _resize(data: bytes, image_format: str, short_edge: int) -> NDArray[np.uint8]:
    """RGB [H, W, 3] whose shorter side is `short_edge`, by Pillow's antialiased bicubic.

    Pillow computes in integers and so gives the same bytes on every machine, which torch's resize does not.
    """
    _, width, height = probe(data)
    scale = short_edge / min(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = None
    if image_format == "jpeg":
        try:
            least = REDUCING_GAP * np.array(size)
            pixels = simplejpeg.decode_jpeg(data, min_width=int(least[0]), min_height=int(least[1]), strict=True)
        except ValueError:
            pass  # a rare kind of JPEG, or a bad one: decode tells
    image = Image.fromarray(_pixels(data) if pixels is None else pixels)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _encode(pixels: NDArray[np.uint8], quality: int) -> Prepared:
    """As a JPEG by Pillow; simplejpeg's encoder uses the inexact fast DCT, whatever it is asked for."""
    height, width, _ = pixels.shape
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return Prepared(buffer.getvalue(), "jpeg", width, height)
