"""`vitscale-data inspect` on builds with good, small, broken and nastily named images: what a reader gets to see."""

import base64
import io
import json
import zlib
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from builder_command import picture, refused, succeeded, vitscale_data, write_tar
from PIL import Image, ImageFile

from data_tools.contact_sheet import CELL_PX, GAP_PX, MARGIN_PX, MOUNT, TITLE_PX, fitting
from data_tools.pictures import THUMBNAIL_PX, choose, read_pictures, salvage, thumbnail
from data_tools.rejected import kind_of
from vitscale.data.index import DATASET_FILE, read_dataset

TENCH, GOLDFISH = "n01440764", "n01443537"
NASTY = """"><script>alert('&')<script>"""


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(colour="red", size=(600, 300)):
    return encoded(Image.new("RGB", size, colour))


def noise(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    good = {f"{TENCH}_{i}.JPEG": picture(i) for i in range(6)}
    write_tar(folder / f"{TENCH}.tar", {**good, f"{NASTY}.JPEG": photograph()})
    jpeg, png = noise("JPEG"), noise("PNG")
    broken = {"jpeg": jpeg[: len(jpeg) // 2], "png": png[: len(png) // 2], "html": b"<html>404</html>"}
    goldfish = {f"{GOLDFISH}_{i}.JPEG": picture(10 + i) for i in range(3)}
    write_tar(
        folder / f"{GOLDFISH}.tar", {**goldfish, **{f"{GOLDFISH}_{name}.JPEG": data for name, data in broken.items()}}
    )
    return folder


@pytest.fixture
def built(source, tmp_path):
    return build(source, tmp_path, "drop")


def build(source, tmp_path, on_bad):
    out = tmp_path / "built"
    words = ("build", "--source", "class-tars", source, "--out", out, "--on-bad", on_bad)
    succeeded(vitscale_data(*words))
    return out


def look(folder, report, *options):
    succeeded(vitscale_data("inspect", folder, "--out", report, *options))
    return Page((report / "index.html").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a browser would make of a page: images, figures with their text, all tags; and that each tag is closed."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.text, self.seen, self.figures, self.images, self.open = "", [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "figure":
            self.figures.append({"title": dict(attributes).get("title"), "text": "", "image": None})
        if tag == "img":
            header, data = dict(attributes)["src"].split(",")
            assert header == "data:image/jpeg;base64"
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            image.load()
            self.figures[-1]["image"] = image

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "figure" in self.open:
            self.figures[-1]["text"] += f"{data} "

    @property
    def samples(self):
        return [figure for figure in self.figures if figure["title"] and " at byte " in figure["title"]]

    @property
    def rejects(self):
        return {figure["title"]: figure for figure in self.figures if figure["title"] and figure not in self.samples}


def test_the_page_shows_each_sample_with_its_class_size_and_place(built, tmp_path):
    page = look(built, tmp_path / "report")
    rows = pq.read_table(built / "train.parquet").to_pylist()
    assert [sample["title"] for sample in page.samples] == [
        f"{row['key']} in {row['shard']} at byte {row['offset']}" for row in rows
    ]
    for row, sample in zip(rows, page.samples, strict=True):
        assert sample["text"].split()[:2] == ["tench" if row["wnid"] == TENCH else "goldfish", row["wnid"]]
        assert f"{row['width']}\xa0x\xa0{row['height']}\xa0px" in sample["text"]
        width, height = sample["image"].size
        assert max(width, height) <= THUMBNAIL_PX
        assert width / height == pytest.approx(row["width"] / row["height"], rel=0.01)


def test_the_page_needs_no_other_file_and_escapes_names(built, tmp_path):
    page = look(built, tmp_path / "report")
    assert any(NASTY in sample["title"] for sample in page.samples)
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "iframe", "object", "a"}
    references = {name for _, attributes in page.seen for name in attributes if name in ("src", "href", "srcset")}
    assert references == {"src"}
    assert "url(" not in page.text
    (policy,) = (attributes["content"] for tag, attributes in page.seen if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_the_page_sums_the_dataset_up(built, tmp_path):
    page = look(built, tmp_path / "report", "--batch", 4)
    stats = json.loads(vitscale_data("stats", built, "--batch", 4, "--json").stdout)["splits"]["train"]
    assert f"{stats['mixing']['score']:.3f}" in page.text
    for words in ("10 (", "2 of 2 have images", "batch of 4 in", "Most images", "Fewest images", "file size, bytes"):
        assert words in page.text
    assert [tag for tag, _ in page.seen].count("svg") == 4


def test_rejects_are_shown_with_reason_and_what_is_left_of_them(built, tmp_path):
    rejects = look(built, tmp_path / "report").rejects
    assert set(rejects) == {f"{GOLDFISH}_{name}" for name in ("jpeg", "png", "html")}
    html = rejects[f"{GOLDFISH}_html"]
    assert "not an image (its bytes begin with 3c 68 74 6d)" in html["text"]
    assert "nothing to see" in html["text"]
    for name in ("jpeg", "png"):
        rest = np.asarray(rejects[f"{GOLDFISH}_{name}"]["image"], dtype=float)
        assert rest[: len(rest) // 3].std() > 10 * rest[-len(rest) // 4 :].std()  # noise above, nothing below


def test_rejects_are_named_when_their_source_is_gone(built, source, tmp_path):
    for tar in source.iterdir():
        tar.unlink()
    rejects = look(built, tmp_path / "report").rejects
    assert len(rejects) == 3
    assert all("nothing to see" in reject["text"] for reject in rejects.values())
    (built / "plan.json").write_text("{")
    assert look(built, tmp_path / "report").rejects == rejects
    (built / "plan.json").unlink()
    assert look(built, tmp_path / "report").rejects == rejects


def test_images_that_were_kept_though_broken_say_why_they_cannot_be_seen(source, tmp_path):
    page = look(build(source, tmp_path, "keep"), tmp_path / "report")
    faults = [sample["text"] for sample in page.samples if sample["image"] is None]
    assert len(faults) == 3
    assert any("cannot be read: not an image" in fault for fault in faults)
    assert not any("px" in fault for fault in faults)
    assert ", 3 of them cannot be read" in page.text


def test_a_dataset_without_bad_images_says_so(tmp_path):
    (tmp_path / "source").mkdir()
    write_tar(tmp_path / "source" / f"{TENCH}.tar", {"a.JPEG": picture(0)})
    folder = build(tmp_path / "source", tmp_path, "fail")
    assert "None: the source had no bad image." in look(folder, tmp_path / "report").text
    index = tmp_path / "index"
    succeeded(vitscale_data("index", folder / "train-000000.tar", "--out", index, "--workers", 1))
    assert "indexed, not built" in look(index, tmp_path / "report").text


def test_the_sheet_shows_each_sample_in_its_cell(built, tmp_path):
    look(built, tmp_path / "report")
    sheet = np.asarray(Image.open(tmp_path / "report" / "contact-sheet.png"))
    keys = pq.read_table(built / "train.parquet")["key"].to_pylist()
    (place,) = (place for place, key in enumerate(keys) if NASTY in key)
    row_px = (sheet.shape[0] - 2 * MARGIN_PX - TITLE_PX) // 2
    left = MARGIN_PX + place % 8 * (CELL_PX + GAP_PX)
    top = MARGIN_PX + TITLE_PX + GAP_PX + place // 8 * row_px
    cell = sheet[top : top + CELL_PX, left : left + CELL_PX].astype(int)
    # A red image twice as wide as high, between two strips of the mount.
    assert abs(cell[CELL_PX // 2] - (254, 0, 0)).max() <= 2
    assert "".join(f"{value:02x}" for value in cell[10, 10]) == MOUNT[1:]


def test_text_is_cut_to_the_width_it_has():
    class Mono:
        def getlength(self, text):
            return len(text)

    assert fitting("tench", Mono(), 5) == "tench"
    assert fitting("great white shark", Mono(), 9) == "great..."
    assert fitting("tench", Mono(), 3) == "..."


def test_the_seed_chooses_the_samples(built, tmp_path):
    reports = [tmp_path / name for name in ("a", "b", "c")]
    pages = [
        look(built, report, "--samples", 4, "--seed", seed) for report, seed in zip(reports, (1, 1, 2), strict=True)
    ]
    for name in ("index.html", "contact-sheet.png"):
        same, again, other = ((report / name).read_bytes() for report in reports)
        assert same == again != other
    assert [len(page.samples) for page in pages] == [4, 4, 4]


def test_the_choice_is_of_distinct_rows_in_ascending_order():
    rows = np.arange(0, 3000, 3)
    chosen = choose(rows, 100, seed=0)
    assert len(chosen) == 100
    assert set(chosen) <= set(rows)
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(choose(rows, 5000, seed=0), rows)


def test_rows_are_found_in_whatever_row_group_they_lie(built):
    table = pq.read_table(built / "train.parquet")
    pq.write_table(table, built / "train.parquet", row_group_size=3)
    rows = np.array([0, 2, 3, 8, 9])
    pictures = read_pictures(built, read_dataset(built), "train", rows)
    assert [one.key for one in pictures] == [table["key"][int(row)].as_py() for row in rows]


def test_bytes_that_are_not_those_of_the_index_are_not_shown(built, tmp_path):
    shard = built / "train-000000.tar"
    rows = pq.read_table(built / "train.parquet").to_pylist()
    content = bytearray(shard.read_bytes())
    content[rows[0]["offset"] + 100] ^= 1
    shard.write_bytes(content[: rows[-1]["offset"] + 20])
    samples = look(built, tmp_path / "report").samples
    assert "its crc32 is not the one in the index" in samples[0]["text"]
    assert "its shard ends too early" in samples[-1]["text"]
    assert [sample["image"] is None for sample in samples] == [True] + [False] * (len(rows) - 2) + [True]


def test_the_options_answer_to_machines_too(built, tmp_path):
    result = succeeded(vitscale_data("inspect", built, "--out", tmp_path / "report", "--samples", 2, "--json"))
    tree = json.loads(result.stdout)
    assert tree["page"] == str(tmp_path / "report" / "index.html")
    assert (tree["samples"], tree["unreadable"], tree["rejects"]) == (2, 0, 3)


def test_another_split_can_be_looked_at(digits_dataset, tmp_path):
    page = look(digits_dataset, tmp_path / "report", "--split", "val", "--samples", 3)
    assert "split val" in page.text
    assert all("in val-" in sample["title"] for sample in page.samples)
    refusal = refused(vitscale_data("inspect", digits_dataset, "--out", tmp_path / "report", "--split", "test"))
    assert "no split 'test'" in refusal


def test_a_missing_shard_is_refused(built, tmp_path):
    (built / "train-000000.tar").unlink()
    assert "shard is missing" in refused(vitscale_data("inspect", built, "--out", tmp_path / "report"))


def test_shards_on_another_machine_are_refused(built, tmp_path):
    tree = json.loads((built / DATASET_FILE).read_text())
    (built / DATASET_FILE).write_text(json.dumps({**tree, "shards_at": "s3://bucket/set"}))
    line = refused(vitscale_data("inspect", built, "--out", tmp_path / "report"))
    assert "its shards are at s3://bucket/set: copy them here" in line


def test_damaged_rejects_are_refused(built, tmp_path):
    (built / "rejects.parquet").write_bytes(b"PAR1")
    assert "rejects.parquet: damaged" in refused(vitscale_data("inspect", built, "--out", tmp_path / "report"))


def test_a_report_is_not_written_into_the_dataset_or_onto_a_file(built, tmp_path):
    before = sorted(built.iterdir())
    assert "is the dataset's folder" in refused(vitscale_data("inspect", built, "--out", f"{built}/."))
    assert sorted(built.iterdir()) == before
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(vitscale_data("inspect", built, "--out", tmp_path / "file"))


def test_small_images_grow_by_a_whole_number_and_large_ones_shrink():
    small = encoded(Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), "PNG")
    pixels = np.asarray(thumbnail(small))
    assert np.array_equal(pixels[::56, ::56], np.arange(48).reshape(4, 4, 3))
    assert np.array_equal(pixels, pixels[::56, ::56].repeat(56, axis=0).repeat(56, axis=1))
    assert thumbnail(photograph(size=(600, 300))).size == (224, 112)
    assert thumbnail(photograph(size=(2000, 2))).size == (224, 1)


def test_bombs_are_not_decoded_for_what_is_left_of_them():
    bomb = bytearray(encoded(Image.new("L", (10, 10)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert salvage(bytes(bomb)) is None
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_salvage_leaves_pillow_strict():
    png = noise("PNG")
    assert salvage(png[: len(png) // 2]).size == (224, 149)
    assert salvage(b"RIFF\0\0\0\0WEBPVP8 ") is None
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("not an image (its bytes begin with 3c 68)", "not an image"),
        ("60000 x 60000 pixels are over the limit of 80000000", "N x N pixels are over the limit of N"),
        ("leak: looks like val/n01.JPEG (3 of 64 bits differ)", "leak: looks like"),
        ("leak: the same file as val/n01.JPEG", "leak: the same file"),
        ("jpeg: Premature end of JPEG file", "jpeg: Premature end of JPEG file"),
    ],
)
def test_reasons_of_one_kind_are_counted_together(reason, kind):
    assert kind_of(reason) == kind
