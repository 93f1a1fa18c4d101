"""The walk over a tar: it finds what the standard library finds, and refuses what that passes over."""

import io
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from data_tools.tar_scan import Member, TarScan, scan_tar, split_name
from data_tools.ustar import BLOCK_BYTES, END_OF_TAR, entry
from vitscale.errors import ShardError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
A_NAME = st.from_regex(r"([a-zä]{1,60}/){0,4}[a-zé]{1,60}\.(jpg|cls)", fullmatch=True)
CONTENTS = st.dictionaries(A_NAME, st.binary(max_size=1500), max_size=6)


def tar_of(contents, form=tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def with_member(info: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(info)
    return buffer.getvalue()


def found(path: Path, **part) -> list[tuple[str, int, int]]:
    return [(member.name, member.offset, member.size) for member in scan_tar(path, **part)]


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ShardError) as caught:
        list(scan_tar(path))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=CONTENTS)
def test_it_finds_what_the_standard_library_finds(tmp_path, form, contents):
    path = tmp_path / "a.tar"
    try:
        path.write_bytes(tar_of(contents, FORMATS[form]))
    except ValueError:  # ustar has no room for the name
        return
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert found(path) == expected
    with TarScan(path) as scan:
        for member in scan:
            content = contents[member.name]
            assert scan.read(member.offset, member.size) == content
            assert member.head == content[: len(member.head)]
            buffer = memoryview(bytearray(member.size))
            scan.read_into(member.offset, buffer)
            assert buffer == content


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_tar_cut_anywhere_before_its_end_mark_is_refused(tmp_path, data):
    whole = b"".join((*entry("a.jpg", b"x" * 700), *entry("a.cls", b"1"), END_OF_TAR))
    cut = data.draw(st.integers(0, len(whole) - len(END_OF_TAR) + BLOCK_BYTES - 1))
    assert "offset" in refusal(tmp_path / "cut.tar", whole[:cut])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, BLOCK_BYTES - 1), change=st.integers(1, 255))
def test_a_changed_byte_of_a_header_is_found(tmp_path, position, change):
    content = bytearray(b"".join((*entry("a.jpg", b"x"), *entry("b.jpg", b"y" * 600), END_OF_TAR)))
    content[1024 + position] ^= change
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    if 148 + 6 <= position < 156:  # the fill behind the checksum's digits tells nothing
        with suppress(ShardError):
            assert [name for name, _, _ in found(path)] == ["a.jpg", "b.jpg"]
    else:
        with pytest.raises(ShardError, match="offset 1024: damaged"):
            found(path)


def test_a_tar_within_a_file_is_read_in_place(tmp_path):
    inner = tar_of({"n1/a.jpg": b"abc", "n1/b.jpg": b""})
    path = tmp_path / "outer"
    path.write_bytes(b"?" * 512 + inner + b"?" * 700)
    assert found(path, start=512, end=512 + len(inner)) == [("n1/a.jpg", 1024, 3), ("n1/b.jpg", 2048, 0)]


def header_with(place: int, field: bytes) -> bytes:
    """The header of d/a.jpg, 3 bytes long, with some bytes replaced and a right checksum."""
    header = bytearray(entry("d/a.jpg", b"xyz")[0])
    header[place : place + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("field", [b"\x80" + bytes(10) + b"\3", b"000000000003", b"          3 ", b"3" + bytes(11)])
def test_folders_are_passed_over_and_sizes_have_many_forms(tmp_path, field):
    folder = tarfile.TarInfo("d")
    folder.type = tarfile.DIRTYPE
    path = tmp_path / "a.tar"
    path.write_bytes(with_member(folder)[:512] + header_with(124, field) + b"xyz" + bytes(509) + END_OF_TAR)
    assert list(scan_tar(path)) == [Member("d/a.jpg", 512, 1024, 3, b"xyz")]


def test_only_ustar_keeps_folders_behind_the_name(tmp_path):
    path = tmp_path / "a.tar"
    times = b"12345670123\0"  # of GNU tar's own format
    path.write_bytes(header_with(257, b"ustar  \0" + bytes(80) + times) + b"xyz" + bytes(509) + END_OF_TAR)
    assert found(path) == [("d/a.jpg", 512, 3)]


def test_a_file_that_ends_behind_the_tar_is_named(tmp_path):
    assert "offset 0: d/a.jpg has 3 bytes, more than" in refusal(tmp_path / "a.tar", header_with(0, b"d"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("x.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    assert "x.jpg is no plain file" in refusal(tmp_path / "a.tar", with_member(info))


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "a/.."])
@pytest.mark.fault(33)
def test_names_that_point_out_of_the_tar_are_refused(tmp_path, name):
    info = tarfile.TarInfo(name)
    assert f"{name} points out" in refusal(tmp_path / "a.tar", with_member(info))


def test_dots_inside_a_name_are_no_way_out(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"a..b/c...jpg": b""}))
    assert found(tmp_path / "a.tar") == [("a..b/c...jpg", 512, 0)]


def pax(records: bytes) -> bytes:
    body = bytearray(b"".join(entry("pax", records)))
    body[156] = ord("x")
    body[148:156] = b" " * 8
    body[148:156] = b"%06o\0 " % sum(body[:512])
    return bytes(body) + b"".join(entry("a.jpg", b"")) + END_OF_TAR


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tar_of({"a.jpg": b""}) + tar_of({"b.jpg": b""}), "second tar"),
        (b"".join(entry("a.jpg", b"")).replace(b"a.jpg", b"\xff.jpg"), "damaged tar header"),
        (with_member(tarfile.TarInfo("\udcff.jpg")), "not UTF-8"),
        (pax(b"22 GNU.sparse.major=1\n"), "sparse"),
        (pax(b"99 path=x\n"), "damaged extension header"),
        (pax(b"9 path=\xff\n"), "damaged extension header"),
        (pax(b"x"), "damaged extension header"),
        (pax(b"x" * (1 << 20) + b"x"), "an extension header of 1048577 bytes"),
        (header_with(124, b"-0000000001\0") + END_OF_TAR, "damaged tar header"),
        (header_with(124, b"zzzzzzzzzzz\0") + END_OF_TAR, "damaged tar header"),
        (b"junk" * 300, "damaged tar header"),
        (b"", "end mark"),
    ],
)
def test_what_cannot_be_trusted_is_refused(tmp_path, content, said):
    assert said in refusal(tmp_path / "a.tar", content)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ShardError, match=r"nowhere\.tar: cannot be opened"):
        TarScan(tmp_path / "nowhere.tar")
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({"a.jpg": b"abc"}))
    with TarScan(path) as tar:
        size = path.stat().st_size
        with pytest.raises(ShardError, match="cut off"):
            tar.read(size - 1, 2)
        with pytest.raises(ShardError, match="cut off"):
            tar.read_into(size - 1, memoryview(bytearray(2)))
    with TarScan(path) as tar:
        tar.file.close()
        tar.file = (tmp_path / "b").open("wb", buffering=0)  # a file that cannot be read from
        with pytest.raises(ShardError, match="cannot be read"):
            tar.read(0, 1)
        with pytest.raises(ShardError, match="cannot be read"):
            tar.read_into(0, memoryview(bytearray(1)))


@settings(max_examples=50)
@given(st.from_regex(r"(\.?[a-zA-Z_]{0,3}/){0,2}[a-zA-Z_]{1,4}(\.[a-zA-Z]{1,4}){1,3}", fullmatch=True))
def test_keys_are_cut_as_webdataset_cuts_them(name):
    key, extension = base_plus_ext(name)
    assert split_name(name) == (key, extension.lower())
