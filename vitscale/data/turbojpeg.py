"""Decode a rectangle of a JPEG with libturbojpeg 3, where the machine has it.

The dependencies' own decoders give whole images only. TurboJPEG 3 leaves out the inverse DCT, the upsampling
and the colours of what lies outside a rectangle, and all of what lies below it. Without the library nothing is
missing but speed: the pixels are the same.

`VITSCALE_TURBOJPEG` names the library's file; set but empty, none is used. Unset, it is searched for where the
linker looks (in a conda environment that includes its `lib`), then in the wheel `turbojpeg`, which brings one.
"""

import ctypes
import functools
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitscale.errors import ConfigError

VARIABLE = "VITSCALE_TURBOJPEG"

_NAMES = ("libturbojpeg.0.dylib", "libturbojpeg.dylib") if sys.platform == "darwin" else ("libturbojpeg.so.0",)

# From turbojpeg.h; its enumerations only grow at the end.
_INIT_DECOMPRESS = 1
_PARAM_STOP_ON_WARNING, _PARAM_SUBSAMP, _PARAM_WIDTH, _PARAM_HEIGHT, _PARAM_COLOURS = 0, 4, 5, 6, 8
_PIXELS_RGB = 0
_COLOURS_GREY = 2  # below it RGB and YCbCr, above it CMYK and YCCK
# Width in pixels of the blocks that columns can be left out by: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1, 4:4:1.
_BLOCK_WIDTHS_PX = (8, 16, 16, 8, 8, 32, 8)

# Chroma is interpolated from the next sample on either side, which is at most 2 pixels away.
_MARGIN_PX = 2


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("left", "top", "width", "height")]


class _Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("numerator", "denominator")]


class TurboJpeg:
    """The functions of one libturbojpeg; threads may share it, and the decoder runs without the GIL."""

    def __init__(self, path: str) -> None:
        """Load the library.

        Raises:
            OSError: it cannot be loaded.
            AttributeError: it is older than version 3.
        """
        library = ctypes.CDLL(path)
        handle, data = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_size_t)
        for name, result, arguments in (
            ("tj3Init", handle, (ctypes.c_int,)),
            ("tj3Destroy", None, (handle,)),
            ("tj3Get", ctypes.c_int, (handle, ctypes.c_int)),
            ("tj3Set", ctypes.c_int, (handle, ctypes.c_int, ctypes.c_int)),
            ("tj3DecompressHeader", ctypes.c_int, (handle, *data)),
            ("tj3SetScalingFactor", ctypes.c_int, (handle, _Factor)),
            ("tj3SetCroppingRegion", ctypes.c_int, (handle, _Region)),
            ("tj3Decompress8", ctypes.c_int, (handle, *data, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.path = path
        self._library = library

    def decode(
        self, data: bytes, top: int, left: int, height: int, width: int, *, reduction: int = 1
    ) -> NDArray[np.uint8] | None:
        """The pixels of a part of a JPEG, equal to those of the whole decoded image.

        Args:
            data: the file. What lies below the part is not looked at.
            top, left, height, width: the part, in pixels of the reduced image and inside it.
            reduction: 1, 2, 4 or 8: both sides of the image are divided by it, rounded up, while decoding.

        Returns:
            RGB [height, width, 3], a view; None where the library cannot do it: damaged data, CMYK, lossless or
            12-bit files, unusual chroma sampling. Decoding the whole image tells which.
        """
        library = self._library
        handle = library.tj3Init(_INIT_DECOMPRESS)
        if not handle:
            return None
        try:
            library.tj3Set(handle, _PARAM_STOP_ON_WARNING, 1)
            if library.tj3DecompressHeader(handle, data, len(data)) != 0:
                return None
            sampling = library.tj3Get(handle, _PARAM_SUBSAMP)
            if not 0 <= sampling < len(_BLOCK_WIDTHS_PX) or library.tj3Get(handle, _PARAM_COLOURS) > _COLOURS_GREY:
                return None
            image_height = -(-library.tj3Get(handle, _PARAM_HEIGHT) // reduction)
            image_width = -(-library.tj3Get(handle, _PARAM_WIDTH) // reduction)
            block_px = _BLOCK_WIDTHS_PX[sampling] // reduction
            first_row = max(0, top - _MARGIN_PX)
            first_column = max(0, left - _MARGIN_PX) // block_px * block_px
            rows = min(image_height, top + height + _MARGIN_PX) - first_row
            columns = min(image_width, left + width + _MARGIN_PX) - first_column
            pixels = np.empty((rows, columns, 3), np.uint8)
            failed = (
                library.tj3SetScalingFactor(handle, _Factor(1, reduction))
                or library.tj3SetCroppingRegion(handle, _Region(first_column, first_row, columns, rows))
                or library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, pixels.strides[0], _PIXELS_RGB)
            )
        finally:
            library.tj3Destroy(handle)
        return None if failed else pixels[top - first_row :, left - first_column :][:height, :width]


@functools.cache
def find() -> TurboJpeg | None:
    """The machine's libturbojpeg, searched for once a process; None if there is none of version 3 or later.

    Raises:
        ConfigError: VITSCALE_TURBOJPEG names a file that is not such a library.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is None:
        wheel = Path(sysconfig.get_path("platlib"), "turbojpeg.libs")
        candidates = (*_NAMES, *map(str, wheel.glob("libturbojpeg*")))
        return next(filter(None, map(_load, candidates)), None)
    library = _load(chosen) if chosen else None
    if chosen and library is None:
        raise ConfigError(
            f"{VARIABLE}={chosen} is not a libturbojpeg of version 3 or later: name another file, or unset it"
        )
    return library


def _load(path: str) -> TurboJpeg | None:
    try:
        return TurboJpeg(path)
    except (OSError, AttributeError):
        return None
