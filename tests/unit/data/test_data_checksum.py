import zlib

from hypothesis import given
from hypothesis import strategies as st

from vitscale.data.checksum import crc32


@given(st.binary(max_size=10_000))
def test_the_checksum_is_zlib_s_whoever_computes_it(data):
    assert crc32(data) == crc32(memoryview(data)) == zlib.crc32(data)
