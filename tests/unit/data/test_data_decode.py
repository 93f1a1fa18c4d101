import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitscale.data import decode as module
from vitscale.data.decode import BadSample, Box, centre_box, crop_resize, decode, probe


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pillow_pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


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


@given(st.integers(1, 600), st.integers(1, 600), st.floats(0.05, 1.0))
def test_centre_box_is_central_and_inside(height: int, width: int, fraction: float) -> None:
    box = centre_box(height, width, fraction)
    assert box.height == box.width == max(1, round(fraction * min(height, width)))
    assert box.top >= 0
    assert box.left >= 0
    assert abs(2 * box.top + box.height - height) <= 1
    assert abs(2 * box.left + box.width - width) <= 1
