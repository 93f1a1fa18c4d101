import base64
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resized_crop

from vitscale.data import decode as module
from vitscale.data import turbojpeg
from vitscale.data.decode import (
    BadSample,
    Box,
    crop_resize,
    decode,
    decode_crop,
    probe,
    resize_centre,
)

# Steps of 255 that rounding between the two passes of a resize explains; 2 is met once in ten thousand images.
TOLERANCE = 2

# 17 x 11 pixels, by libjpeg-turbo's cjpeg: -sample 3x1, which TurboJPEG has no name for, and -sample 1x4.
UNUSUAL_JPEGS = {
    "3x1": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDACAWGBwYFCAcGhwkIiAmMFA0MCwsMGJGSjpQdGZ6eHJmcG6AkLicgIiuim5woNqirr7EztDO"
        "fJri8uDI8LjKzsb/2wBDASIkJDAqMF40NF7GhHCExsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbG"
        "xsb/wAARCAALABEDATEAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAwT/xAAbEAACAgMBAAAAAAAAAAAAAAAAAgFRBBJhFP/EABUB"
        "AQEAAAAAAAAAAAAAAAAAAAQD/8QAGhEAAgIDAAAAAAAAAAAAAAAAAAECBAMRIf/aAAwDAQACEQMRAD8AhTG4UJjcF83Ck5iK+TgqLFFC"
        "LFC6xQWbB129H//Z"
    ),
    "1x4": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDACAWGBwYFCAcGhwkIiAmMFA0MCwsMGJGSjpQdGZ6eHJmcG6AkLicgIiuim5woNqirr7EztDO"
        "fJri8uDI8LjKzsb/2wBDASIkJDAqMF40NF7GhHCExsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbG"
        "xsb/wAARCAALABEDARQAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAAAAQF/8QAGxABAAIDAQEAAAAAAAAAAAAAAAECBFFhEhT/xAAX"
        "AQEAAwAAAAAAAAAAAAAAAAAEAQID/8QAGhEAAwEBAQEAAAAAAAAAAAAAAAJRAwESE//aAAwDAQACEQMRAD8AhpjcaVKxoE9dqDz0aktM"
        "bjSpWNAy67Ubno1Ivm40vMaBX21EfRqf/9k="
    ),
}


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pillow_pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(params=["whole image", "TurboJPEG"], scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways that decode_crop can take."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "whole image":
            patch.setattr(turbojpeg, "find", lambda: None)
        elif turbojpeg.find() is None:
            pytest.skip("no libturbojpeg 3 here: install the wheel turbojpeg, or set VITSCALE_TURBOJPEG to one")
        yield request.param


@st.composite
def boxes(draw: st.DrawFn, height: int, width: int) -> Box:
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Box(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


def soft_noise(height: int, width: int) -> np.ndarray:
    """Noise far enough from 0 and 255 that no bicubic overshoot is cut off between the passes.

    Cut off, the pixels depend on which pass comes first, and that depends on Pillow's version.
    """
    return np.random.default_rng(1).integers(80, 176, (height, width, 3), dtype=np.uint8)


def differ_by(a: torch.Tensor, b: torch.Tensor) -> int:
    assert a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_jpeg_is_bit_identical_to_pillow(mode: str, options: dict[str, object]) -> None:
    data = encode(noise(37, 51).convert(mode), "JPEG", **options)
    assert torch.equal(decode(data), pillow_pixels(data))


def test_cmyk_jpeg_is_pillows_to_a_rounding() -> None:
    data = encode(noise(37, 51).convert("CMYK"), "JPEG")
    assert (decode(data).int() - pillow_pixels(data).int()).abs().max() <= 1


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_other_formats_are_pillows(image_format: str, mode: str) -> None:
    source = noise(11, 17).convert(mode) if mode != "P" or image_format != "WEBP" else noise(11, 17)
    data = encode(source, image_format)
    assert torch.equal(decode(data), pillow_pixels(data))
    assert probe(data) == (image_format.lower(), 17, 11)


def test_jpeg_header() -> None:
    assert probe(encode(noise(11, 17), "JPEG")) == ("jpeg", 17, 11)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated_files_fail(image_format: str, kept: float) -> None:
    data = encode(noise(40, 40), image_format)
    with pytest.raises(BadSample):
        decode(data[: int(len(data) * kept)])


def test_one_missing_byte_of_a_jpeg_fails() -> None:
    with pytest.raises(BadSample, match="jpeg: "):
        decode(encode(noise(40, 40), "JPEG")[:-1])


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08\0", b"<html></html>", b"\xff\xd8\xff", b"BM", b"GIF89a"])
def test_other_bytes_fail(data: bytes) -> None:
    with pytest.raises(BadSample):
        probe(data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_large_images_are_refused_before_decoding(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IMAGE_PIXELS", 11 * 17 - 1)
    with pytest.raises(BadSample, match="17 x 11 pixels are over the limit of 186"):
        decode(encode(noise(11, 17), image_format))


@pytest.mark.fault(34)
def test_a_bomb_beyond_pillows_own_limit_is_refused() -> None:
    data = encode(noise(1, 1), "PNG")
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + data[24:29]
    data = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(BadSample, match="png header"):
        decode(data)


@pytest.mark.parametrize(("interpolation", "tolerance"), [("bilinear", 1), ("bicubic", 7)])
@pytest.mark.parametrize("size_px", [8, 32, 90])
def test_crop_and_resize_are_pillows(interpolation: str, tolerance: int, size_px: int) -> None:
    image = noise(70, 90)
    resample = Image.Resampling[interpolation.upper()]
    expected = np.array(image.crop((12, 5, 12 + 61, 5 + 43)).resize((size_px, size_px), resample)).astype(int)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    result = crop_resize(pixels, Box(top=5, left=12, height=43, width=61), size_px, interpolation)
    assert result.dtype == torch.uint8
    assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance


@given(
    st.data(),
    st.sampled_from(["444", "422", "420", "440", "411", "Gray"]),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([7, 32]),
    st.sampled_from(["bilinear", "bicubic"]),
)
@settings(max_examples=150)
def test_a_decoded_crop_is_timms(
    way: str, data: st.DataObject, sampling: str, height: int, width: int, size_px: int, interpolation: str
) -> None:
    pixels = soft_noise(height, width)
    jpeg = (
        simplejpeg.encode_jpeg(pixels[..., :1].copy(), 90, "gray", "Gray")
        if sampling == "Gray"
        else simplejpeg.encode_jpeg(pixels, 90, "rgb", sampling)
    )
    box = data.draw(boxes(height, width))
    result = decode_crop(jpeg, box, size_px, interpolation)
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    expected = pil_to_tensor(resized_crop(image, *box, [size_px, size_px], InterpolationMode(interpolation)))
    assert differ_by(result, expected) <= TOLERANCE
    assert torch.equal(result, crop_resize(decode(jpeg), box, size_px, interpolation))


@pytest.mark.parametrize(
    ("mode", "image_format", "options"),
    [
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGB", "WEBP", {"lossless": True}),
    ],
    ids=["progressive", "rgb", "cmyk", "png", "webp"],
)
def test_a_decoded_crop_is_the_crop_of_the_decoded(
    way: str, mode: str, image_format: str, options: dict[str, object]
) -> None:
    data = encode(noise(60, 80).convert(mode), image_format, **options)
    box = Box(10, 21, 30, 40)
    assert torch.equal(decode_crop(data, box, 16, "bicubic"), crop_resize(decode(data), box, 16, "bicubic"))


def test_the_box_may_follow_from_the_images_size(way: str) -> None:
    data = encode(noise(60, 80), "JPEG")
    result = decode_crop(data, lambda height, width: Box(height - 20, width - 30, 20, 30), 16, "bilinear")
    assert torch.equal(result, decode_crop(data, Box(40, 50, 20, 30), 16, "bilinear"))


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_a_crop_from_a_truncated_file_fails(way: str, kept: float) -> None:
    data = encode(noise(160, 160), "JPEG")
    with pytest.raises(BadSample, match="jpeg"):
        decode_crop(data[: int(len(data) * kept)], Box(0, 0, 160, 100), 16, "bilinear")


def test_a_crop_from_other_bytes_fails(way: str) -> None:
    with pytest.raises(BadSample, match="not an image"):
        decode_crop(b"<html></html>", Box(0, 0, 1, 1), 16, "bilinear")


@pytest.mark.parametrize(("box_px", "reduction"), [(31, 1), (32, 2), (63, 2), (64, 4), (127, 4), (128, 8), (300, 8)])
def test_scaled_decoding_halves_while_the_box_stays_large_enough(way: str, box_px: int, reduction: int) -> None:
    data = encode(noise(4, 5).resize((510, 390), Image.Resampling.BICUBIC), "JPEG", quality=95)
    box = Box(40, 80, box_px, box_px + 100)
    result = decode_crop(data, box, 16, "bilinear", scaled=True)
    whole = simplejpeg.decode_jpeg(data, min_height=-(-390 // reduction), min_width=-(-510 // reduction))
    bottom, right = ((edge + reduction // 2) // reduction for edge in (40 + box_px, 180 + box_px))
    top, left = 40 // reduction, 80 // reduction
    part = Box(top, left, bottom - top, right - left)
    assert torch.equal(result, crop_resize(torch.from_numpy(whole).permute(2, 0, 1), part, 16, "bilinear"))
    assert differ_by(result, decode_crop(data, box, 16, "bilinear")) <= 16


@pytest.mark.parametrize("name", UNUSUAL_JPEGS)
def test_unusual_chroma_sampling_is_decoded(way: str, name: str) -> None:
    data = base64.b64decode(UNUSUAL_JPEGS[name])
    assert probe(data) == ("jpeg", 17, 11)
    assert torch.equal(decode(data), pillow_pixels(data))
    box = Box(1, 2, 10, 12)
    assert torch.equal(decode_crop(data, box, 4, "bilinear"), crop_resize(decode(data), box, 4, "bilinear"))
    half = decode_crop(data, box, 4, "bilinear", scaled=True)
    assert differ_by(half, decode_crop(data, box, 4, "bilinear")) <= 40
    with pytest.raises(BadSample):
        decode(data[:-20])


def test_16_bit_greys_keep_their_upper_half() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    data = encode(Image.fromarray(levels * 256 + 77), "PNG")
    assert torch.equal(decode(data), torch.from_numpy(levels.astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped() -> None:
    image = noise(8, 9)
    opaque = pillow_pixels(encode(image.convert("P"), "PNG"))
    assert torch.equal(decode(encode(image.convert("P"), "PNG", transparency=bytes(range(256)))), opaque)
    with_alpha = image.copy()
    with_alpha.putalpha(7)
    assert torch.equal(decode(encode(with_alpha, "PNG")), pil_to_tensor(image))
    grey = Image.merge("LA", [image.convert("L")] * 2)
    assert torch.equal(decode(encode(grey, "PNG")), pil_to_tensor(image.convert("L")).expand(3, -1, -1))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP"])
def test_animations_give_their_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert differ_by(decode(data), pil_to_tensor(frames[0])) <= 1


def test_the_bytes_say_what_it_is() -> None:
    data = encode(noise(11, 17), "PNG")
    assert probe(data) == ("png", 17, 11)


def test_reasons_are_the_same_each_time() -> None:
    with pytest.raises(BadSample, match=r"^bmp header: damaged or truncated$"):
        probe(b"BM")


@given(
    st.integers(1, 130),
    st.integers(1, 130),
    st.sampled_from([16, 40]),
    st.sampled_from([1.0, 0.95, 0.9, 0.875, 0.5]),
    st.sampled_from(["bilinear", "bicubic"]),
)
@settings(max_examples=150)
def test_the_evaluation_view_is_timms(
    height: int, width: int, size_px: int, crop_fraction: float, interpolation: str
) -> None:
    assume(1 / 32 <= height / width <= 32)
    image = Image.fromarray(soft_noise(height, width))
    timms = create_transform(
        (3, size_px, size_px), interpolation=interpolation, crop_pct=crop_fraction, normalize=False
    )
    expected = timms(image)
    assert expected.dtype == torch.uint8
    result = resize_centre(pil_to_tensor(image), size_px, crop_fraction, interpolation)
    assert differ_by(result, expected) <= TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(2, 5000), (5000, 2)])
def test_the_evaluation_view_of_a_line_is_its_middle(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    interpolate = module.F.interpolate
    monkeypatch.setattr(module.F, "interpolate", lambda *a, **k: sizes.append(k["size"]) or interpolate(*a, **k))
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, max(0, height // 2 - 32) : height // 2 + 32, max(0, width // 2 - 32) : width // 2 + 32] = 200
    assert torch.equal(resize_centre(image, 16, 0.5, "bilinear"), torch.full((3, 16, 16), 200, dtype=torch.uint8))
    assert max(sizes[0]) == 32 * 32
