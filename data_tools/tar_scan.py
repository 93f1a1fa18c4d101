"""Finds the files in a tar without reading them: a walk from header to header, ten times as fast as `tarfile`.

It reads what other people's archives hold: ustar, GNU tar with long names, and pax. Unlike `tarfile` it never
stops in silence: a damaged header, a tar that is cut off and a second tar behind the first are errors.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from data_tools.ustar import BLOCK_BYTES
from vitscale.errors import ShardError

# What one read brings: a sample's labels, the next sample's header and the head of its image.
WINDOW_BYTES = 8192

# What each member keeps of it: enough for a label, and for the size in pixels of most JPEGs.
HEAD_BYTES = 2048

# Long names and pax headers are read whole; no sane one is larger.
MAX_EXTENSION_BYTES = 1 << 20

_ZEROS = bytes(BLOCK_BYTES)
# Types of members.
_PLAIN_FILE = b"0\0" + b"7"
_FOLDER = ord("5")
_GNU_LONG_NAME = ord("L")
_PAX_NEXT = ord("x")
_EXTENSIONS = b"LKxg"  # long name, long link, and pax records for the next member or for all

# The lower half of an adler32 is the sum of the bytes plus one, modulo this prime.
_ADLER_PRIME = 65521


class Member(NamedTuple):
    """A plain file in a tar: its name, and the offsets of its header and of its first byte in the outer file.

    `head` are its first bytes, at most HEAD_BYTES: as many as came with the header. A small file is often all there.
    """

    name: str
    header: int
    offset: int
    size: int
    head: bytes


class TarScan:
    """A tar, or the part `start` to `end` of a file that is a tar itself, open for a walk over its members.

    Raises:
        ShardError: the file cannot be opened.
    """

    def __init__(self, path: Path, start: int = 0, end: int | None = None) -> None:
        self.path = path
        try:
            self.file = path.open("rb", buffering=0)
        except OSError as error:
            raise ShardError(f"{path}: cannot be opened ({error.strerror}): check the name and the disk") from None
        self.start = start
        self.end = os.fstat(self.file.fileno()).st_size if end is None else end
        self.members = 0  # files that the walk has met so far
        self._window = b""
        self._window_at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file; free where they lie in the window that the walk has just read.

        Raises:
            ShardError: the file ends before them, or cannot be read.
        """
        at = offset - self._window_at
        if 0 <= at <= len(self._window) - size:
            return self._window[at : at + size]
        try:
            data = os.pread(self.file.fileno(), size, offset)
        except OSError as error:
            raise self.fault(offset, f"cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise self.fault(offset, "the file ends here: it is cut off")
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of the file from the offset on.

        Raises:
            ShardError: the file ends before them, or cannot be read.
        """
        try:
            count = os.preadv(self.file.fileno(), [buffer], offset)
        except OSError as error:
            raise self.fault(offset, f"cannot be read ({error.strerror})") from None
        if count != len(buffer):
            raise self.fault(offset, "the file ends here: it is cut off")

    def fault(self, offset: int, what: str, mend: str = "copy it again, or leave it out") -> ShardError:
        """The error for something wrong at an offset of this file."""
        return ShardError(f"{self.path}: offset {offset}: {what}: {mend}")

    def __iter__(self) -> Iterator[Member]:
        """Plain files in their order; folders are passed over.

        Raises:
            ShardError: a damaged header, a tar that is cut off, a link or device, a name that points out of the
                tar, or anything but zeros after the end mark.
        """
        position, end = self.start, self.end
        window, window_at, last = self._fill(position)
        name, long_size = "", -1  # what an extension header said of the next member
        while True:
            at = position - window_at
            if not 0 <= at <= last:
                window, window_at, last = self._fill(position)
                at = 0
            first = at + BLOCK_BYTES
            header = window[at:first]
            if header == _ZEROS:
                break
            try:  # the usual form: digits to the last place but one or two
                total, size = int(header[148:154], 8), int(header[124 : 136 if header[135] else 135], 8)
            except ValueError:
                total, size = _number(header[148:156]), _number(header[124:136])
            # The checksum is the sum of the bytes, those of its own place counted as spaces. adler32 sums too, from
            # one on, and ten times as fast as `sum`.
            expected = total + sum(header[148:156]) - 8 * 32
            if zlib.adler32(header) & 0xFFFF != (expected + 1) % _ADLER_PRIME or size < 0:
                raise self.fault(position, "damaged tar header (its checksum is wrong)")
            kind = header[156]
            if kind in _EXTENSIONS:
                name, long_size = self._extend(kind, position, size, name, long_size)
            else:
                name = name or self._name(header, position)
                size = size if long_size < 0 else long_size
                usual = kind in _PLAIN_FILE and ".." not in name and name[:1] != "/" != name[-1:]
                if usual or self._is_plain_file(kind, name, position):
                    if position + BLOCK_BYTES + size > end:
                        raise self.fault(position, f"{name} has {size} bytes, more than there are: it is cut off")
                    self.members += 1
                    head = window[first : first + min(size, HEAD_BYTES)]
                    yield Member(name, position, position + BLOCK_BYTES, size, head)
                else:
                    size = 0
                name, long_size = "", -1
            position += BLOCK_BYTES + (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        self._check_rest(position)

    def _fill(self, position: int) -> tuple[bytes, int, int]:
        """Read a window of the file: its bytes, its offset, and the last place of a whole header in it."""
        room = self.end - position
        if room < BLOCK_BYTES:
            raise self.fault(position, "ends without a tar's end mark: it is cut off")
        self._window = self.read(position, min(WINDOW_BYTES, room))
        self._window_at = position
        return self._window, position, len(self._window) - BLOCK_BYTES

    def _is_plain_file(self, kind: int, name: str, position: int) -> bool:
        """Whether a member is a file; a folder is not. Anything else has no place in a tar of images."""
        if name.startswith("/") or ".." in name.split("/"):
            raise self.fault(position, f"member {name} points out of the tar", "make the tar again without it")
        if kind == _FOLDER or (kind == 0 and name.endswith("/")):
            return False
        if kind not in _PLAIN_FILE:
            raise self.fault(position, f"member {name} is no plain file", "make the tar again without it")
        return True

    def _extend(self, kind: int, position: int, size: int, name: str, long_size: int) -> tuple[str, int]:
        """Name and size of the next member as an extension header gives them."""
        if size > MAX_EXTENSION_BYTES or position + BLOCK_BYTES + size > self.end:
            raise self.fault(position, f"an extension header of {size} bytes: damaged or cut off")
        body = self.read(position + BLOCK_BYTES, size)
        try:
            if kind == _GNU_LONG_NAME:
                name = _text(body)
            elif kind == _PAX_NEXT:
                records = _pax_records(body)
                if any(key.startswith(b"GNU.sparse") for key in records):
                    raise self.fault(position, "a sparse file", "make the tar again without --sparse")
                name = _text(records.get(b"path", name.encode()))
                long_size = int(records.get(b"size", long_size))
        except ValueError:
            raise self.fault(position, "damaged extension header") from None
        return name, long_size

    def _name(self, header: bytes, position: int) -> str:
        name = header[:100].split(b"\0", 1)[0]
        # GNU's own format keeps other things where ustar keeps the folders of a name.
        if header[345] and header[257:263] == b"ustar\0":
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
        try:
            return name.decode()
        except ValueError:
            raise self.fault(
                position, f"the name {name!r} is not UTF-8", "make the tar again under other names"
            ) from None

    def _check_rest(self, position: int) -> None:
        """Whatever follows the end mark must be padding: readers would pass over a second tar in silence."""
        while position < self.end:
            data = self.read(position, min(1 << 20, self.end - position))
            if data.count(0) != len(data):
                raise self.fault(
                    position,
                    "something follows the tar's end mark, such as a second tar",
                    "split them, or leave it out",
                )
            position += len(data)


def scan_tar(path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Plain files of a tar (or of the part of a file that is a tar), in order: see `TarScan`."""
    with TarScan(path, start, end) as tar:
        yield from tar


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member by WebDataset's rule: cut at the first dot of the file's name.

    The key keeps its folders, the extension is in lower case and may hold dots itself. No dot: no extension.
    """
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n" of a pax header; a ValueError where they are not of this form."""
    records = {}
    while body:
        digits, _, _ = body.partition(b" ")
        length = int(digits)
        if not len(digits) < length <= len(body):
            raise ValueError
        key, _, value = body[len(digits) + 1 : length - 1].partition(b"=")
        records[key] = value
        body = body[length:]
    return records


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode()


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or GNU's big-endian form for what these cannot hold; -1 for neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1
