"""Every kind of source gives the same images, and says in one line what is wrong with it."""

import gzip
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from builder_command import (
    WNIDS,
    content,
    picture,
    pictures,
    refused,
    succeeded,
    vitscale_data,
    write_class_tars,
    write_tar,
)

from vitscale.data.index import read_dataset, read_index
from vitscale.data.labels import load_label_space
from vitscale.data.split import open_split


def whole_tar(classes):
    """A tar of class tars, as fall11 and winter21 are."""
    members = {}
    for wnid, images in classes.items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in images.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        members[f"whole/{wnid}.tar"] = buffer.getvalue()
    return members


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The shards that every source must give."""
    folder = tmp_path_factory.mktemp("expected")
    source = write_class_tars(folder / "source", pictures())
    succeeded(build("class-tars", source, folder / "out"))
    return shards(folder / "out")


def build(kind, source, out, *options):
    return vitscale_data("build", "--source", kind, source, "--out", out, "--shard-images", 16, *options)


def shards(out):
    return {name: data for name, data in content(out).items() if name.endswith((".tar", "train.parquet"))}


def keys(out, split):
    return set(open_split(out, split).keys.to_pylist())


def test_fall11_is_read_in_place(tmp_path, expected):
    write_tar(tmp_path / "fall11_whole.tar", whole_tar(pictures()))
    succeeded(build("fall11", tmp_path / "fall11_whole.tar", tmp_path / "out"))
    assert shards(tmp_path / "out") == expected
    assert not (tmp_path / "out" / "spool").exists()


def test_folders_of_images_are_read(tmp_path, expected):
    for wnid, images in pictures().items():
        (tmp_path / "tree" / wnid / "deeper").mkdir(parents=True)
        for number, (name, data) in enumerate(images.items()):
            (tmp_path / "tree" / wnid / ("deeper" if number % 2 else "") / name).write_bytes(data)
        (tmp_path / "tree" / wnid / ".hidden").write_text("no image")
    succeeded(build("image-folder", tmp_path / "tree", tmp_path / "out"))
    assert shards(tmp_path / "out") == expected


def test_shards_are_written_anew(tmp_path, expected):
    source = write_class_tars(tmp_path / "source", pictures())
    succeeded(build("class-tars", source, tmp_path / "first", "--seed", 7, "--val-fraction", 0.3))
    succeeded(build("shards", tmp_path / "first", tmp_path / "out"))
    assert shards(tmp_path / "out") == expected
    succeeded(build("shards", tmp_path / "first", tmp_path / "kept", "--split-from-source"))
    for split in ("train", "val"):
        assert keys(tmp_path / "kept", split) == keys(tmp_path / "first", split)


@pytest.mark.parametrize("label", ["cls", "json-label", "json-wnid"])
def test_foreign_shards_tell_their_classes_in_many_ways(tmp_path, expected, label):
    classes = sorted(WNIDS)
    members = {}
    for wnid, images in pictures().items():
        for name, data in images.items():
            key = name.removesuffix(".JPEG")
            members[f"{key}.jpg"] = data
            place = classes.index(wnid)
            told = {
                "cls": str(place),
                "json-label": json.dumps({"label": place}),
                "json-wnid": json.dumps({"wnid": wnid}),
            }
            members[f"{key}.{label.split('-')[0]}"] = told[label].encode()
            members[f"{key}.pkl"] = b"cos\nsystem\n(S'false'\ntR."
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", members)
    (tmp_path / "classes.txt").write_text("# in label order\n" + "\n".join(f"{wnid} a name" for wnid in classes))
    options = () if label == "json-wnid" else ("--source-classes", tmp_path / "classes.txt")
    succeeded(build("shards", tmp_path / "shards", tmp_path / "out", *options))
    assert shards(tmp_path / "out") == expected


@pytest.mark.parametrize("shape", ["class-tars", "image-folder"])
def test_the_folders_of_winter21_tell_the_split_or_are_merged(tmp_path, shape):
    folders = dict(zip(("imagenet21k_train", "imagenet21k_val", "imagenet21k_small_classes"), WNIDS, strict=True))
    for folder, wnid in folders.items():
        images = {f"{wnid}_{number}.JPEG": picture(number) for number in range(3)}
        if shape == "class-tars":
            write_class_tars(tmp_path / "source" / folder, {wnid: images})
        else:
            (tmp_path / "source" / folder / wnid).mkdir(parents=True)
            for name, data in images.items():
                (tmp_path / "source" / folder / wnid / name).write_bytes(data)
    succeeded(build(shape, tmp_path / "source", tmp_path / "split", "--split-from-source"))
    assert keys(tmp_path / "split", "val") == {f"{WNIDS[1]}_{number}" for number in range(3)}
    assert len(keys(tmp_path / "split", "train")) == 6
    succeeded(build(shape, tmp_path / "source", tmp_path / "merged"))
    assert len(keys(tmp_path / "merged", "train")) == 9


def test_labels_are_places_in_the_label_space(tmp_path):
    source = write_class_tars(
        tmp_path / "source", {"n01440764": {"a.JPEG": picture(0)}, "n15075141": {"b.JPEG": picture(1)}, **pictures()}
    )
    result = succeeded(build("class-tars", source, tmp_path / "out", "--classes", "in1k"))
    assert "60 outside the classes" in result.stdout
    dataset = read_dataset(tmp_path / "out")
    assert (dataset.label_space, dataset.classes) == ("in1k", load_label_space("in1k").wnids)
    rows = read_index(tmp_path / "out", dataset, "train", ("wnid", "label")).to_pylist()
    assert sorted((row["wnid"], row["label"]) for row in rows) == [("n01440764", 0), ("n15075141", 999)]
    text = refused(build("class-tars", source, tmp_path / "fail", "--classes", "in1k", "--outside", "fail"))
    assert "60 images are outside --classes in1k, 20 of them in n00000001" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no classes"),
        ("n00000001\nn00000001\n", "holds n00000001 twice"),
        (None, "no label space and no readable"),
    ],
)
def test_a_class_list_that_cannot_be_used_is_one_line(tmp_path, text, said):
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    source = write_class_tars(tmp_path / "source", {WNIDS[0]: {"a.JPEG": picture(0)}})
    assert said in refused(build("class-tars", source, tmp_path / "out", "--classes", tmp_path / "classes.txt"))


@pytest.fixture
def winter21(tmp_path):
    write_tar(tmp_path / "winter21.tar", whole_tar(pictures()))
    (tmp_path / "winter21.tar.gz").write_bytes(gzip.compress((tmp_path / "winter21.tar").read_bytes(), 1))
    return tmp_path / "winter21.tar.gz"


def test_winter21_is_unpacked_in_one_pass_that_resumes(tmp_path, winter21, expected):
    out = tmp_path / "out"
    whole = winter21.read_bytes()
    winter21.write_bytes(whole[: len(whole) * 5 // 6])
    assert "not a whole gzip file" in refused(build("winter21-gz", winter21, out))
    finished = {path.name: path.stat() for path in (out / "spool").glob("*.tar")}
    assert 0 < len(finished) < 3
    winter21.write_bytes(whole)
    succeeded(build("winter21-gz", winter21, out, "--keep-spool"))
    again = {path.name: path.stat() for path in (out / "spool").glob("*.tar")}
    assert len(again) == 3
    assert {name: again[name].st_ino for name in finished} == {name: stat.st_ino for name, stat in finished.items()}
    assert shards(out) == expected
    succeeded(build("winter21-gz", winter21, tmp_path / "gone"))
    assert shards(tmp_path / "gone") == expected
    assert not (tmp_path / "gone" / "spool").exists()


def test_winter21_is_refused_where_the_disk_has_too_little_room(tmp_path, winter21, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "GB are free, spool and shards take about" in refused(build("winter21-gz", winter21, tmp_path / "out"))


def test_a_spool_of_another_source_is_refused(tmp_path, winter21):
    spool = tmp_path / "out" / "spool"
    spool.mkdir(parents=True)
    (spool / "done").write_text("another")
    assert f"{spool}: holds another source's images" in refused(build("winter21-gz", winter21, tmp_path / "out"))


def damaged_gz(path):
    whole = bytearray(path.read_bytes())
    whole[-8] ^= 1  # the checksum of all bytes
    path.write_bytes(whole)


def gz_of(path, members):
    write_tar(path, members)
    path.write_bytes(gzip.compress(path.read_bytes()))


def cut_inside(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:20_000]))


def broken_header(path):
    whole = bytearray(gzip.decompress(path.read_bytes()))
    whole[150] ^= 1
    path.write_bytes(gzip.compress(bytes(whole)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is no file"),
        (lambda path: path.write_bytes(b"not gzip" * 100), "not a whole gzip file"),
        (damaged_gz, "not a whole gzip file"),
        (broken_header, "damaged tar inside"),
        (cut_inside, "ends inside"),
        (lambda path: gz_of(path, {"notes.txt": b"x"}), "member notes.txt is no class tar"),
    ],
)
def test_a_winter21_that_cannot_be_used_is_one_line(tmp_path, winter21, damage, said):
    damage(winter21)
    assert f"{winter21}: " in (text := refused(build("winter21-gz", winter21, tmp_path / "out")))
    assert said in text
    assert not (tmp_path / "out" / "plan.json").exists()


def _no_tars(source):
    for path in source.iterdir():
        path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[:9000])


def link(path):
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.JPEG")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_tars, "holds no class tars"),
        (lambda s: (s / "cats.tar").write_bytes((s / f"{WNIDS[0]}.tar").read_bytes()), "cats.tar: the name is no wnid"),
        (lambda s: (s / f"{WNIDS[0]}.tar").write_bytes(b"junk" * 300), WNIDS[0]),
        (lambda s: write_tar(s / f"{WNIDS[0]}.tar", {}), "holds no images"),
        (lambda s: write_tar(s / f"{WNIDS[0]}.tar", {"../../x.JPEG": picture(0)}), "../../x.JPEG"),
        (lambda s: truncated(s / f"{WNIDS[0]}.tar"), WNIDS[0]),
        (lambda s: link(s / f"{WNIDS[0]}.tar"), "a.JPEG"),
        (lambda s: write_tar(s / f"{WNIDS[0]}.tar", {"a/x.JPEG": b"", "b/x.JPEG": b""}), "same key"),
    ],
)
def test_class_tars_that_cannot_be_used_are_one_line(tmp_path, damage, said):
    source = write_class_tars(tmp_path / "source", pictures())
    damage(source)
    assert said in refused(build("class-tars", source, tmp_path / "out"))
    assert not (tmp_path / "out" / "plan.json").exists()


def test_other_sources_that_cannot_be_used_are_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    for kind in ("class-tars", "image-folder", "shards"):
        assert "is no folder" in refused(build(kind, tmp_path / "none", out))
    assert "is no file" in refused(build("fall11", empty, out))
    assert "holds no class folders" in refused(build("image-folder", empty, out))
    assert "holds no tars" in refused(build("shards", empty, out))
    write_tar(tmp_path / "other.tar", {"notes.txt": b"x"})
    assert "member notes.txt is no class tar" in refused(build("fall11", tmp_path / "other.tar", out))
    write_tar(tmp_path / "other.tar", {})
    assert "holds no class tars" in refused(build("fall11", tmp_path / "other.tar", out))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: (folder / "a cat").mkdir(), "a class name must be one word"),
        (lambda folder: (folder / "cat").mkdir(), "holds no images"),
        (lambda folder: (folder / "dog" / "b.jpg").symlink_to("/etc/passwd"), "is a link"),
    ],
)
def test_image_folders_that_cannot_be_used_are_one_line(tmp_path, make, said):
    (tmp_path / "tree" / "dog").mkdir(parents=True)
    (tmp_path / "tree" / "dog" / "a.jpg").write_bytes(picture(0))
    make(tmp_path / "tree")
    assert said in refused(build("image-folder", tmp_path / "tree", tmp_path / "out"))


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("apple", "train"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "0.jpg").write_bytes(picture(0))
    succeeded(build("image-folder", tmp_path / "tree", tmp_path / "out"))
    assert read_dataset(tmp_path / "out").classes == ("apple", "train")
    assert keys(tmp_path / "out", "train") == {"apple_0", "train_0"}


def test_an_image_that_shrank_since_it_was_planned_is_one_line(tmp_path):
    (tmp_path / "tree" / "dog").mkdir(parents=True)
    image = tmp_path / "tree" / "dog" / "a.jpg"
    image.write_bytes(picture(0))
    out = tmp_path / "out"
    succeeded(vitscale_data("plan", "--source", "image-folder", tmp_path / "tree", "--out", out))
    image.write_bytes(picture(0)[:-1])
    assert f"{image}: ends inside dog/a.jpg: it changed" in refused(vitscale_data("build", "--out", out))
    image.unlink()
    assert f"No such file or directory: '{image}'" in refused(vitscale_data("build", "--out", out))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.cls": b"0"}, "sample a has 0 images"),
        ({"a.jpg": b"", "a.png": b"", "a.cls": b"0"}, "sample a has 2 images"),
        (
            {"a.jpg": b"", "a.cls": b"3"},
            "has the label 3, and 3 classes are known: give the list of wnids with --source-classes",
        ),
        ({"a.jpg": b"", "a.cls": b"-1"}, "has the label -1"),
        ({"a.jpg": b"", "a.json": b"[1"}, "sample a has a .json that cannot be read"),
        ({"a.jpg": b"", "a.txt": b"a caption"}, "has no class"),
        ({"a.jpg": b"", "a.json": b'{"wnid": "a cat"}'}, "has no class"),
    ],
)
def test_samples_without_one_image_and_a_class_are_one_line(tmp_path, members, said):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", members)
    (tmp_path / "classes.txt").write_text("\n".join(sorted(WNIDS)))
    options = ("--source-classes", tmp_path / "classes.txt")
    assert said in refused(build("shards", tmp_path / "shards", tmp_path / "out", *options))


def test_a_label_without_a_list_of_wnids_is_refused(tmp_path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": b"", "a.cls": b"3"})
    assert "has the label 3, and no wnid" in refused(build("shards", tmp_path / "shards", tmp_path / "out"))


def test_shards_of_one_seed_differ_from_those_of_another(tmp_path):
    source = write_class_tars(tmp_path / "source", pictures())
    for seed in (0, 1):
        succeeded(build("class-tars", source, tmp_path / f"{seed}", "--seed", seed, "--val-fraction", 0.2))
    first, second = (open_split(tmp_path / f"{seed}", "train").keys.to_pylist() for seed in (0, 1))
    assert set(first) != set(second)
    assert np.mean([one == other for one, other in zip(first, second, strict=False)]) < 0.3
