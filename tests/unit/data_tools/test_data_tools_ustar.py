"""Our tar headers, read and written by the standard library."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.ustar import BLOCK_BYTES, END_OF_TAR, MAX_NAME_BYTES, entry

names = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1).filter(
    lambda name: len(name.encode()) <= MAX_NAME_BYTES
)


@given(name=names, data=st.binary(max_size=3 * BLOCK_BYTES))
def test_an_entry_is_what_tarfile_writes(name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    expected = member.tobuf(tarfile.USTAR_FORMAT, "utf-8")
    header, content, padding = entry(name, data)
    assert (content, (len(content) + len(padding)) % BLOCK_BYTES) == (data, 0)
    # tarfile leaves the device numbers as zeros in octal.
    assert header[:148] == expected[:148]
    with tarfile.open(fileobj=io.BytesIO(header + content + padding + END_OF_TAR)) as tar:
        (found,) = tar
        assert (found.name, found.mode, found.mtime, found.uid) == (name, 0o644, 0, 0)
        assert tar.extractfile(found).read() == data


@pytest.mark.parametrize("character", ["\xff", "\U0010ffff"])
def test_the_largest_checksum_is_right(character):
    name = character * (MAX_NAME_BYTES // len(character.encode()))
    header, _, _ = entry(name, b"x" * 0o777)
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").name == name
