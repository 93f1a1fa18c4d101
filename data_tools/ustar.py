"""The headers of a plain tar (POSIX.1-1988 ustar), several times faster than the standard library's.

Only what shards need: regular files with short names, and nothing that differs between two builds.
"""

import zlib

BLOCK_BYTES = 512
MAX_NAME_BYTES = 100
END_OF_TAR = bytes(2 * BLOCK_BYTES)

# Octal sizes have 11 digits.
MAX_FILE_BYTES = 8**11 - 1


def entry(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, data and padding of one file: mode 0644, owner 0, time 0."""
    encoded = name.encode()
    assert len(encoded) <= MAX_NAME_BYTES
    assert len(data) <= MAX_FILE_BYTES
    header = b"%b0000644\0%b%b%011o\0%011o\0        0%bustar\x0000%b" % (
        encoded.ljust(MAX_NAME_BYTES, b"\0"),
        b"0000000\0",  # owner
        b"0000000\0",  # group
        len(data),
        0,  # modification time
        bytes(100),  # no link
        bytes(247),  # no names of owner and group, no device, no prefix
    )
    # The checksum is the sum of all bytes, with spaces in its own place. adler32 has that sum plus one in its lower
    # half (modulo 65521, which no header's sum reaches), many times as fast as `sum`.
    checksum = (zlib.adler32(header) & 0xFFFF) - 1
    header = header[:148] + b"%06o\0 " % checksum + header[156:]
    return header, data, bytes(-len(data) % BLOCK_BYTES)
