"""Rewrites a JPEG as a baseline one, without loss: the coefficients stay, only their coding changes.

A progressive file stores each block in several scans, and decodes two to three times as slowly. The work is done
by libturbojpeg 3, found as in `vitscale.data.turbojpeg`; neither Pillow nor simplejpeg reach the coefficients.
"""

import ctypes
import functools

import torch

from vitscale.data import turbojpeg
from vitscale.data.decode import decode
from vitscale.errors import ConfigError

# Frame markers of what is baseline as far as a decoder's speed goes: Huffman codes, one scan for all frequencies.
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))

# From turbojpeg.h; its enumerations only grow at the end.
_INIT_TRANSFORM = 2
_PARAM_STOP_ON_WARNING = 0
_OPTION_OPTIMIZE = 256  # Huffman tables made for the image: smaller files


class _Transform(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("left", "top", "width", "height", "operation", "options")),
        ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    ]


def require_library() -> None:
    """Raise a ConfigError where the library is missing, before hours of work meet their first progressive file."""
    if turbojpeg.find() is None:
        raise ConfigError(
            "--reencode baseline needs libturbojpeg 3: pip install turbojpeg, or name the library's file in "
            f"{turbojpeg.VARIABLE}"
        )


def is_sequential(data: bytes) -> bool:
    """Whether a JPEG is baseline or extended sequential with Huffman codes, by its frame header."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker in _FRAMES:
            return marker in _SEQUENTIAL_FRAMES
        # A marker may be preceded by any number of fill bytes.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True  # nothing to gain from a file that cannot be understood


def to_baseline(data: bytes) -> bytes:
    """The JPEG with the same pixels as a baseline file; its own bytes if it is one, or cannot be rewritten exactly.

    A file that stops before its last scan is sharpened up by decoders as long as it is progressive: it stays.
    Metadata stays as well.

    Raises:
        BadSample: the file is truncated or damaged.
        ConfigError: libturbojpeg is missing.
    """
    if is_sequential(data):
        return data
    pixels = decode(data)
    rewritten = _transform(data)
    return data if rewritten is None or not torch.equal(decode(rewritten), pixels) else rewritten


def _transform(data: bytes) -> bytes | None:
    """The coefficients in a baseline file; None where libturbojpeg cannot take them, as of unusual chroma sampling."""
    library = _library()
    handle = library.tj3Init(_INIT_TRANSFORM)
    result, size = ctypes.c_void_p(), ctypes.c_size_t()
    try:
        library.tj3Set(handle, _PARAM_STOP_ON_WARNING, 1)
        transform = _Transform(options=_OPTION_OPTIMIZE)
        failed = library.tj3Transform(
            handle, data, len(data), 1, ctypes.byref(result), ctypes.byref(size), ctypes.byref(transform)
        )
        return None if failed else ctypes.string_at(result, size.value)
    finally:
        library.tj3Free(result)
        library.tj3Destroy(handle)


@functools.cache
def _library() -> ctypes.CDLL:
    require_library()
    found = turbojpeg.find()
    assert found is not None
    library = ctypes.CDLL(found.path)
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("tj3Init", pointer, (ctypes.c_int,)),
        ("tj3Set", ctypes.c_int, (pointer, ctypes.c_int, ctypes.c_int)),
        (
            "tj3Transform",
            ctypes.c_int,
            (pointer, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int, pointer, pointer, pointer),
        ),
        ("tj3Free", None, (pointer,)),
        ("tj3Destroy", None, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
