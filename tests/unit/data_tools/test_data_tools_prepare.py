"""Images on their way into a shard: what passes untouched, what is rewritten, and how close to the original."""

import gzip
import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from data_tools import jpeg_rewrite
from data_tools import prepare as prepare_module
from data_tools.jpeg_rewrite import is_sequential, to_baseline
from data_tools.prepare import Preparation, check_image, parse_reencode, prepare, unpack
from vitscale.data import turbojpeg
from vitscale.data.decode import BadSample, decode, probe
from vitscale.errors import ConfigError

PHOTO = Image.fromarray(load_sample_images().images[0])
SMALL = PHOTO.resize((130, 90))
LARGE = PHOTO.crop((0, 0, 639, 426)).resize((1200, 800))

needs_library = pytest.mark.skipif(turbojpeg.find() is None, reason="needs libturbojpeg 3 (pip install turbojpeg)")


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


FORMATS = {
    "jpeg": encode(SMALL),
    "progressive": encode(SMALL, progressive=True),
    "grey": encode(SMALL.convert("L")),
    "cmyk": encode(SMALL.convert("CMYK")),
    "png": encode(SMALL, "PNG"),
    "palette": encode(SMALL.convert("P"), "GIF"),
    "webp": encode(SMALL, "WEBP"),
    "alpha": encode(SMALL.convert("RGBA"), "PNG"),
}


def pillow_pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("check", ["decode", "header"])
def test_by_default_every_byte_stays(name, check):
    data = FORMATS[name]
    assert prepare(data, Preparation(check=check)) == (data, *probe(data))


@pytest.mark.parametrize("name", FORMATS)
def test_a_gzipped_image_is_unpacked(name):
    data = FORMATS[name]
    assert prepare(gzip.compress(data), Preparation()) == (data, *probe(data))


def test_gzip_that_is_cut_damaged_or_a_bomb_is_bad(monkeypatch):
    packed = gzip.compress(FORMATS["jpeg"])
    with pytest.raises(BadSample, match="gzip: truncated"):
        unpack(packed[:-20])
    with pytest.raises(BadSample, match="gzip: "):
        unpack(packed[:200] + b"\0" * 50 + packed[250:])
    monkeypatch.setattr(prepare_module, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(BadSample, match="unpacks to over 1000 bytes"):
        unpack(gzip.compress(bytes(10_000_000)))


def outcome(function, data: bytes) -> str:
    try:
        function(data)
    except BadSample as error:
        return f"bad: {error}"
    return "sound"


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    at=st.floats(0, 1, exclude_max=True),
    cut=st.booleans(),
    value=st.integers(0, 255),
)
def test_the_quick_check_is_as_strict_as_decoding(name, at, cut, value):
    data = bytearray(FORMATS[name])
    place = int(at * len(data))
    if cut:
        del data[place:]
    else:
        data[place] = value
    assert outcome(check_image, bytes(data)) == outcome(decode, bytes(data))


def test_only_the_header_check_lets_a_truncated_image_pass():
    half = FORMATS["jpeg"][: len(FORMATS["jpeg"]) // 2]
    assert prepare(half, Preparation(check="header")).data == half
    with pytest.raises(BadSample, match="jpeg"):
        prepare(half, Preparation(check="decode"))
    with pytest.raises(BadSample, match="jpeg"):
        prepare(half, Preparation(check="header", max_short_edge=50))
    with pytest.raises(BadSample, match="not an image"):
        prepare(b"", Preparation(check="header"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_quality_makes_every_image_a_jpeg_of_training_s_pixels(name):
    data = FORMATS[name]
    made = prepare(data, Preparation(reencode=90))
    assert made[1:] == ("jpeg", 130, 90)
    pixels = decode(data).permute(1, 2, 0).numpy()
    assert simplejpeg.decode_jpeg_header(made.data)[3] == "420"
    expected = pillow_pixels(encode(Image.fromarray(pixels), quality=90, subsampling="4:2:0"))
    assert not (pillow_pixels(made.data) != expected).any()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize(("edge", "width"), [(256, 384), (65, 98), (200, 300), (1, 2)])
def test_a_large_image_gets_the_short_edge_and_stays_close_to_a_full_resize(form, edge, width):
    data = encode(LARGE, form)
    made = prepare(data, Preparation(max_short_edge=edge))
    assert made[1:] == probe(made.data) == ("jpeg", width, edge)
    full = Image.fromarray(pillow_pixels(data)).resize((width, edge), Image.Resampling.BICUBIC)
    reference = pillow_pixels(encode(full, quality=95, subsampling="4:2:0")).astype(int)
    difference = np.abs(pillow_pixels(made.data) - reference)
    if form == "PNG":
        assert not difference.any()
    elif edge > 1:
        assert difference.mean() < 1.5  # the shrinking decoder is not exact; encoding alone costs as much


def test_an_image_that_is_small_enough_stays_and_the_quality_of_a_resized_one_can_be_chosen():
    data = FORMATS["png"]
    assert prepare(data, Preparation(max_short_edge=90)).data == data
    coarse = prepare(data, Preparation(max_short_edge=60, reencode=30))
    assert len(coarse.data) < len(prepare(data, Preparation(max_short_edge=60)).data)


@needs_library
@pytest.mark.parametrize("name", FORMATS)
def test_baseline_leaves_pixels_and_other_files_as_they_are(name):
    data = FORMATS[name]
    made = prepare(data, Preparation(reencode="baseline"))
    if name == "progressive":
        assert made.data != data
        assert is_sequential(made.data)
        assert np.array_equal(pillow_pixels(made.data), pillow_pixels(data))
    else:
        assert made.data == data
    assert made[1:] == probe(data)


@needs_library
@settings(max_examples=20)
@given(
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    quality=st.integers(5, 100),
    subsampling=st.sampled_from([0, 1, 2]),
)
def test_a_progressive_jpeg_keeps_every_pixel_and_its_metadata(mode, size, quality, subsampling):
    exif = Image.Exif()
    exif[0x010E] = "a description"
    image = SMALL.resize(size).convert(mode)
    data = encode(image, progressive=True, quality=quality, subsampling=subsampling, exif=exif)
    made = to_baseline(data)
    assert not is_sequential(data)
    assert is_sequential(made)
    assert np.array_equal(pillow_pixels(made), pillow_pixels(data))
    assert Image.open(io.BytesIO(made)).getexif()[0x010E] == "a description"


@needs_library
def test_a_progressive_file_that_ends_before_its_last_scan_is_left_alone_if_the_pixels_would_change():
    data = encode(PHOTO.resize((400, 300)), progressive=True, quality=90)
    scans = [place for place in range(len(data) - 1) if data[place : place + 2] == b"\xff\xda"]
    early = data[: scans[3]] + b"\xff\xd9"
    assert np.array_equal(pillow_pixels(to_baseline(early)), pillow_pixels(early))


@needs_library
def test_a_truncated_progressive_file_is_bad():
    data = FORMATS["progressive"]
    with pytest.raises(BadSample, match="jpeg: "):
        to_baseline(data[: len(data) // 2])


def test_frames_are_told_apart_by_their_markers():
    start, fill, comment = b"\xff\xd8", b"\xff\xff\xff", b"\xff\xfe\x00\x04\xff\xc2"
    assert is_sequential(start + comment + fill + b"\xc0\x00\x11\x08")
    assert not is_sequential(start + comment + fill + b"\xc2\x00\x11\x08")
    assert not is_sequential(start + b"\xff\xc4\x00\x02" + b"\xff\xc9\x00\x11\x08")  # arithmetic codes
    assert is_sequential(start + b"??????")
    assert is_sequential(start)


def test_settings_are_read_and_what_they_need_is_known_before_the_work(monkeypatch):
    assert [parse_reencode(word) for word in ("never", "baseline", "1", "100")] == ["never", "baseline", 1, 100]
    for word in ("0", "101", "-3", "high", ""):
        with pytest.raises(ConfigError, match="--reencode"):
            parse_reencode(word)
    monkeypatch.setattr(turbojpeg, "find", lambda: None)
    Preparation(reencode=90).require()
    with pytest.raises(ConfigError, match="libturbojpeg 3"):
        Preparation(reencode="baseline").require()
    jpeg_rewrite._library.cache_clear()
    with pytest.raises(ConfigError, match="libturbojpeg 3"):
        to_baseline(FORMATS["progressive"])


def test_a_file_that_libturbojpeg_cannot_rewrite_stays(monkeypatch):
    monkeypatch.setattr(jpeg_rewrite, "_transform", lambda data: None)
    assert to_baseline(FORMATS["progressive"]) == FORMATS["progressive"]
