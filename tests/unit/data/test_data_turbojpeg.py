import base64
import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitscale.data import turbojpeg
from vitscale.data.turbojpeg import TurboJpeg
from vitscale.errors import ConfigError

FOUND = turbojpeg.find()
SAMPLINGS = ("444", "422", "420", "440", "411", "Gray")

# 17 x 11 pixels, by libjpeg-turbo's cjpeg: -sample 2x2,2x1,2x1 and -lossless 1.
CALLED_440 = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDACAWGBwYFCAcGhwkIiAmMFA0MCwsMGJGSjpQdGZ6eHJmcG6AkLicgIiuim5woNqirr7EztDOfJri"
    "8uDI8LjKzsb/2wBDASIkJDAqMF40NF7GhHCExsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsbGxsb/wAAR"
    "CAALABEDASIAAiEBAyEB/8QAFgABAQEAAAAAAAAAAAAAAAAABAAF/8QAGxAAAgIDAQAAAAAAAAAAAAAAAAIBUQQSYRT/xAAXAQADAQAAAAAA"
    "AAAAAAAAAAAAAgME/8QAFxEAAwEAAAAAAAAAAAAAAAAAAAEDE//aAAwDAQACEQMRAD8ACmNwQmNwUixQhFih3VknVmWdmbp2YLzcI0tYohdW"
    "BfZgf//Z"
)
LOSSLESS = (
    "/9j/7gAOQWRvYmUAZAAAAAAA/8MAEQgACwARA1IRAEcRAEIRAP/EABcAAQEBAQAAAAAAAAAAAAAAAAAEBQj/2gAMA1IARwBCAAEAAOf+f1xc"
    "XFxcXFxcXFxcXFxcXFw1FxcXFxcXFxcXFxcXFxcXFw1FxcXFxcXFxcXFxcXFxcXFw1FxcXFxcXFxcXFxcXFxcXFw1FxcXFxcXFxcXFxcXFxc"
    "XFw1FxcXFxcXFxcXFxcXFxcXFw1FxcXFxcXFxcXFxcXFxcXFw1FxcXFxcXFxcXFxcXFxcXFw1FxcXFxcXFxcXFxcXFxcXFw1FxcXFxcXFxcX"
    "FxcXFxcXFw1FxcXFxcXFxcXFxcXFxcXFx//Z"
)


@pytest.fixture(scope="module")
def library() -> TurboJpeg:
    if FOUND is None:
        pytest.skip("no libturbojpeg 3 here: install the wheel turbojpeg, or set VITSCALE_TURBOJPEG to one")
    return FOUND


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(pixels: np.ndarray, sampling: str) -> bytes:
    return simplejpeg.encode_jpeg(pixels, 90, "gray" if sampling == "Gray" else "rgb", sampling)


def pillow_jpeg(mode: str = "RGB", height: int = 50, width: int = 70, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(height, width)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def spans(length: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, length - 1), st.integers(1, length)).map(lambda s: (s[0], max(1, s[1] - s[0])))


@given(st.data(), st.sampled_from(SAMPLINGS), st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=300)
def test_a_part_has_the_pixels_of_the_whole(
    library: TurboJpeg, data: st.DataObject, sampling: str, height: int, width: int
) -> None:
    jpeg = encode(noise(height, width, 1 if sampling == "Gray" else 3), sampling)
    (top, rows), (left, columns) = data.draw(spans(height)), data.draw(spans(width))
    part = library.decode(jpeg, top, left, rows, columns)
    whole = simplejpeg.decode_jpeg(jpeg)
    np.testing.assert_array_equal(part, whole[top : top + rows, left : left + columns])


@given(st.data(), st.sampled_from(SAMPLINGS), st.sampled_from([2, 4, 8]), st.integers(64, 150), st.integers(64, 150))
@settings(max_examples=100)
def test_a_part_has_the_pixels_of_the_reduced_whole(
    library: TurboJpeg, data: st.DataObject, sampling: str, reduction: int, height: int, width: int
) -> None:
    jpeg = encode(noise(height, width, 1 if sampling == "Gray" else 3), sampling)
    whole = simplejpeg.decode_jpeg(jpeg, min_height=-(-height // reduction), min_width=-(-width // reduction))
    (top, rows), (left, columns) = (data.draw(spans(length)) for length in whole.shape[:2])
    part = library.decode(jpeg, top, left, rows, columns, reduction=reduction)
    np.testing.assert_array_equal(part, whole[top : top + rows, left : left + columns])


@pytest.mark.parametrize("options", [{"progressive": True}, {"keep_rgb": True}, {"restart_marker_rows": 1}])
def test_other_jpegs_too(library: TurboJpeg, options: dict[str, object]) -> None:
    jpeg = pillow_jpeg(**options)
    np.testing.assert_array_equal(library.decode(jpeg, 11, 23, 20, 30), simplejpeg.decode_jpeg(jpeg)[11:31, 23:53])


def test_what_lies_below_is_not_looked_at(library: TurboJpeg) -> None:
    jpeg = pillow_jpeg()
    whole = simplejpeg.decode_jpeg(jpeg)
    cut = jpeg[: len(jpeg) * 3 // 4]
    np.testing.assert_array_equal(library.decode(cut, 0, 0, 20, 70), whole[:20])
    assert library.decode(cut, 20, 0, 30, 70) is None


@pytest.mark.parametrize(
    "jpeg",
    [
        b"",
        b"\xff\xd8\xff",
        pillow_jpeg()[:200],
        pillow_jpeg("CMYK"),
        base64.b64decode(CALLED_440),
        base64.b64decode(LOSSLESS),
    ],
    ids=["empty", "start", "header only", "cmyk", "wrongly called 4:4:0", "lossless"],
)
def test_what_it_cannot_decode_is_none(library: TurboJpeg, jpeg: bytes) -> None:
    assert library.decode(jpeg, 0, 10, 5, 5) is None


def test_the_variable_names_the_library(library: TurboJpeg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITSCALE_TURBOJPEG", library.path)
    found = turbojpeg.find.__wrapped__()
    assert found is not None
    assert found.path == library.path


def test_an_empty_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITSCALE_TURBOJPEG", "")
    assert turbojpeg.find.__wrapped__() is None


@pytest.mark.parametrize("path", ["/nowhere/libturbojpeg.so", "libc.so.6"], ids=["missing", "another library"])
def test_a_wrong_variable_is_a_config_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITSCALE_TURBOJPEG", path)
    with pytest.raises(ConfigError, match=f"^VITSCALE_TURBOJPEG={path} is not a libturbojpeg of version 3 or later: "):
        turbojpeg.find.__wrapped__()


def test_a_machine_without_it_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITSCALE_TURBOJPEG", raising=False)
    monkeypatch.setattr(turbojpeg, "_NAMES", ("libvitscale-none.so", "libc.so.6"))
    monkeypatch.setattr(turbojpeg.sysconfig, "get_path", lambda name: str(tmp_path))
    assert turbojpeg.find.__wrapped__() is None


def test_the_wheels_library_is_found(library: TurboJpeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITSCALE_TURBOJPEG", raising=False)
    monkeypatch.setattr(turbojpeg, "_NAMES", ())
    monkeypatch.setattr(turbojpeg.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "turbojpeg.libs").mkdir()
    (tmp_path / "turbojpeg.libs/libturbojpeg-1a2b.so.0").symlink_to(library.path)
    found = turbojpeg.find.__wrapped__()
    assert found is not None
    assert found.path == str(tmp_path / "turbojpeg.libs/libturbojpeg-1a2b.so.0")
