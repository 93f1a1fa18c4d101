"""The leakage filter: copies are found whatever was done to their encoding, other pictures are not."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from data_tools import leakage as leakage_module
from data_tools.index_shards import index_shards
from data_tools.leakage import LeakageFilter, NearHashes, perceptual_hash
from vitscale.errors import ShardError


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def clouds(seed: int) -> Image.Image:
    """A picture with the spectrum of a natural one."""
    height, width = 150, 200
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) * np.maximum(frequency, 1) ** -1.2
    grey, *colours = np.fft.ifft2(spectrum).real
    pixels = np.stack([grey, 0.8 * grey + 0.2 * colours[0], 0.7 * grey + 0.3 * colours[1]], axis=-1)
    return Image.fromarray((255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8))


def quarters(image: Image.Image) -> list[Image.Image]:
    width, height = image.width // 2, image.height // 2
    return [image.crop((x, y, x + width, y + height)) for x in (0, width) for y in (0, height)]


PHOTOS = [quarter for pixels in load_sample_images().images for quarter in quarters(Image.fromarray(pixels))]
KNOWN = PHOTOS[::2] + [clouds(seed) for seed in range(30)]
OTHERS = PHOTOS[1::2] + [clouds(seed) for seed in range(100, 130)]

CHANGES = {
    "coarse": lambda image: encode(image, quality=20),
    "png": lambda image: encode(image, "PNG"),
    "webp": lambda image: encode(image, "WEBP", quality=60),
    "half": lambda image: encode(image.resize((image.width // 2, image.height // 2)), quality=85),
    "double": lambda image: encode(image.resize((image.width * 2, image.height * 2)), quality=85),
    "square": lambda image: encode(image.resize((256, 256)), quality=90),
    "grey": lambda image: encode(image.convert("L"), quality=85),
    "bright": lambda image: encode(image.point(lambda value: min(255, value + value // 8)), quality=85),
    "progressive": lambda image: encode(image, quality=75, progressive=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    for number, image in enumerate(KNOWN):
        (root / f"known_{number:02d}.jpg").write_bytes(encode(image, quality=92))
    (root / "labels.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def leakage(folder) -> LeakageFilter:
    return LeakageFilter.build(folder)


def test_the_same_file_is_found_by_its_bytes_also_in_gzip(leakage, folder):
    assert len(leakage) == len(KNOWN)
    data = (folder / "known_03.jpg").read_bytes()
    assert leakage.match(data) == leakage.match(gzip.compress(data)) == "leak: the same file as known_03.jpg"


@pytest.mark.parametrize("name", CHANGES)
def test_changed_copies_are_found(leakage, name):
    for number, image in enumerate(KNOWN):
        reason = leakage.match(CHANGES[name](image))
        assert reason is not None
        assert reason.startswith(f"leak: looks like known_{number:02d}.jpg (")


def test_other_pictures_are_not_found(leakage):
    assert [leakage.match(encode(image)) for image in OTHERS] == [None] * len(OTHERS)


def test_pictures_of_next_to_nothing_match_only_by_their_bytes(tmp_path):
    white = encode(Image.new("RGB", (100, 80), "white"))
    (tmp_path / "white.jpg").write_bytes(white)
    leakage = LeakageFilter.build(tmp_path)
    assert leakage.match(white) is not None
    assert perceptual_hash(white) is None
    assert leakage.match(encode(Image.new("RGB", (100, 80), "white"), quality=50)) is None


def test_what_is_no_image_is_no_leak(leakage):
    for data in (b"", b"not an image", encode(KNOWN[0])[:40], b"\x1f\x8bdamaged", b"\x89PNG\r\n\x1a\nshort"):
        assert leakage.match(data) is None


def test_the_reference_may_be_a_tar_a_folder_of_tars_or_a_dataset(tmp_path, folder):
    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars" / "val.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(2):
            tar.add(folder / f"known_{number:02d}.jpg", f"{number}.jpg")
            label = tarfile.TarInfo(f"{number}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"0"))
    index_shards({"val": [path]}, tmp_path / "set", classes=None, label_space=None, crc=True, workers=1)
    data = (folder / "known_01.jpg").read_bytes()
    for reference in (path, path.parent, tmp_path / "set"):
        leakage = LeakageFilter.build(reference, distance=2)
        assert len(leakage) == 2
        assert leakage.match(data) == "leak: the same file as val.tar/1.jpg"
    assert len(LeakageFilter.build(folder / "known_01.jpg")) == 1


def test_a_saved_filter_is_the_same_filter(leakage, tmp_path):
    for name in ("a", "b"):
        leakage.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = LeakageFilter.load(tmp_path / "a")
    assert LeakageFilter.load(tmp_path / "a") is loaded
    assert (len(loaded), loaded.distance) == (len(leakage), leakage.distance)
    for data in (*map(CHANGES["half"], KNOWN[:5]), encode(KNOWN[0], quality=92), encode(OTHERS[0])):
        assert loaded.match(data) == leakage.match(data)


def test_a_reference_or_a_file_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ShardError, match="nowhere: not found"):
        LeakageFilter.build(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="holds no images"):
        LeakageFilter.build(tmp_path)
    (tmp_path / "file").write_bytes(b"junk")
    for name in ("file", "missing"):
        with pytest.raises(ShardError, match=f"{name}: cannot be read"):
            LeakageFilter.load(tmp_path / name)


def test_a_reference_image_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "gone.jpg").write_bytes(encode(KNOWN[0]))
    jobs = list(leakage_module._jobs(tmp_path))
    (tmp_path / "gone.jpg").unlink()
    monkeypatch.setattr(leakage_module, "_jobs", lambda reference: jobs)
    with pytest.raises(ShardError, match=r"gone\.jpg: cannot be read"):
        LeakageFilter.build(tmp_path)


@settings(max_examples=50)
@given(data=st.data(), distance=st.integers(0, 16), size=st.integers(0, 40))
def test_the_nearest_hash_is_the_one_of_a_search_through_all(data, distance, size):
    centre = data.draw(st.integers(0, 2**64 - 1))
    flips = st.lists(st.integers(0, 63), max_size=distance + 3).map(lambda bits: sum(1 << bit for bit in set(bits)))
    hashes = [centre ^ flip for flip in data.draw(st.lists(flips, min_size=size, max_size=size))]
    near = NearHashes(np.array(hashes, dtype=np.uint64), distance)
    distances = [(value ^ centre).bit_count() for value in hashes]
    best = min(distances, default=65)
    assert near.nearest(centre) == ((distances.index(best), best) if best <= distance else (None, 64))
