"""The mirror against a real S3 server and a folder: what gets there, what comes back, and what an outage does."""

import logging
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
from micro_run import micro_tree
from moto.server import ThreadedMotoServer
from saved_tags import flip_a_bit, save, stage, truncate

from vitscale.checkpoint import (
    CheckpointStore,
    Mirror,
    mirror_of,
    rank_file_name,
    record_file,
    restore_newest,
    update_mirror,
)
from vitscale.checkpoint import mirror as mirror_module
from vitscale.checkpoint.mirror import MirrorError
from vitscale.config import CheckpointSection, Config
from vitscale.errors import CheckpointError, ConfigError, ExitStatus

TWO = CheckpointSection(keep_last=2)
TAG_10, TAG_20, TAG_30, TAG_40 = (f"step-000000{step}" for step in (10, 20, 30, 40))


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, request) -> str:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # What a user sets, and nothing else.
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    name = f"bucket-{abs(hash(request.node.name))}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}/runs/b16"


class Place:
    """A mirror's objects, seen and damaged past the mirror itself."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.folder = Path(urlsplit(url).path) if url.startswith("file:") else None

    def names(self) -> list[str]:
        if self.folder is not None:
            return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
        url, client = urlsplit(self.url), boto3.client("s3", region_name="us-east-1")
        found = client.list_objects_v2(Bucket=url.netloc, Prefix=url.path[1:]).get("Contents", [])
        return sorted(entry["Key"].removeprefix(f"{url.path[1:]}/") for entry in found)

    def tags(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self.names()})

    def write(self, name: str, content: bytes) -> None:
        if self.folder is not None:
            (self.folder / name).write_bytes(content)
            return
        url = urlsplit(self.url)
        client = boto3.client("s3", region_name="us-east-1")
        client.put_object(Bucket=url.netloc, Key=f"{url.path[1:]}/{name}", Body=content)

    def remove(self, name: str) -> None:
        if self.folder is not None:
            (self.folder / name).unlink()
            return
        url = urlsplit(self.url)
        boto3.client("s3", region_name="us-east-1").delete_object(Bucket=url.netloc, Key=f"{url.path[1:]}/{name}")


@pytest.fixture(params=["s3", "file"])
def place(request, tmp_path) -> Place:
    if request.param == "s3":
        return Place(request.getfixturevalue("bucket"))
    return Place(f"file://{tmp_path}/mirror/b16")


@pytest.fixture
def mirror(place) -> Mirror:
    return Mirror(place.url, patience_s=5)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run")


@pytest.fixture
def empty(tmp_path) -> CheckpointStore:
    """The store of a node whose disk has nothing."""
    return CheckpointStore(tmp_path / "elsewhere" / "run")


@pytest.fixture(autouse=True)
def _nothing_silent(caplog):
    caplog.set_level(logging.INFO, logger="vitscale")


def contents(store: CheckpointStore, tag: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path(tag).iterdir()}


def test_what_is_uploaded_comes_back_byte_for_byte(store, empty, mirror, place):
    assert mirror.tags() == mirror.unfinished() == []
    assert restore_newest(empty, mirror).fetched is None
    assert not empty.root.exists()
    assert place.folder is None or not place.folder.parent.exists()  # a look makes no folder
    save(store, 10)
    save(store, 20)
    update_mirror(mirror, store, TWO, TAG_20)
    assert mirror.tags() == [TAG_10, TAG_20]
    assert place.names() == [
        f"{tag}/{name}" for tag in (TAG_10, TAG_20) for name in ("manifest.json", "rank-00000.safetensors",
                                                                 "rank-00001.safetensors")
    ]  # fmt: skip
    assert mirror.faults(TAG_20) == []
    manifest = restore_newest(empty, mirror).fetched
    assert manifest.step == 20
    assert contents(empty, TAG_20) == contents(store, TAG_20)
    assert empty.newest_valid()[0] == TAG_20
    assert empty.unfinished() == []
    assert empty.highest_generation() == 1


def test_large_files_go_in_parts(store, empty, mirror, monkeypatch):
    monkeypatch.setattr(mirror_module, "_PART_BYTES", 5 << 20)  # what S3 takes at least
    staging, manifest = stage(store, 10)
    path = staging / rank_file_name(0)
    path.write_bytes(os.urandom(12 << 20))
    store.commit(staging, manifest.model_copy(update={"files": [record_file(path)]}))
    update_mirror(mirror, store, TWO, TAG_10)
    monkeypatch.setattr(mirror_module, "_READ_BYTES", 5 << 20)
    asked: list[tuple[int, int]] = []
    read = mirror._obstore.get_range

    def noted(place, name, *, start, length):
        asked.append((start, length))
        return read(place, name, start=start, length=length)

    monkeypatch.setattr(mirror._obstore, "get_range", noted)
    assert restore_newest(empty, mirror).fetched.step == 10
    assert contents(empty, TAG_10)[path.name] == contents(store, TAG_10)[path.name]
    assert asked == [(0, 5 << 20), (5 << 20, 5 << 20), (10 << 20, 2 << 20)]


def test_the_mirror_is_pruned_by_the_same_rules(store, empty, mirror, place):
    keep = CheckpointSection(keep_last=1, keep_every_steps=20)
    for step in (10, 20, 30, 40, 50):
        tag = save(store, step)
        store.prune(keep, tag)
        update_mirror(mirror, store, keep, tag)
        assert place.tags() == store.tags()
    assert place.tags() == [TAG_20, TAG_40, "step-00000050"]
    # A node that has only the newest of them removes none that is to be kept, and all that is not.
    restore_newest(empty, mirror)
    tag = save(empty, 60, generation=2)
    update_mirror(mirror, empty, keep, tag)
    assert place.tags() == [TAG_20, TAG_40, "step-00000050", "step-00000060"]
    empty.prune(keep, tag)
    update_mirror(mirror, empty, keep, tag)
    assert place.tags() == [TAG_20, TAG_40, "step-00000060"]


def test_an_upload_that_was_cut_off_is_no_checkpoint_and_is_cleared_away(store, empty, mirror, place):
    save(store, 10)
    save(store, 20)
    update_mirror(mirror, store, TWO, TAG_20)
    place.remove(f"{TAG_20}/manifest.json")
    assert mirror.tags() == [TAG_10]
    assert mirror.unfinished() == [TAG_20]
    assert restore_newest(empty, mirror).fetched.step == 10
    save(store, 30)
    store.prune(CheckpointSection(keep_last=1), TAG_30)
    update_mirror(mirror, store, CheckpointSection(keep_last=1), TAG_30)
    assert place.tags() == [TAG_30]


DAMAGES = {
    "flipped": (lambda place, tag: place.write(f"{tag}/rank-00001.safetensors", b"x" * 656), "of another content"),
    "longer": (lambda place, tag: place.write(f"{tag}/rank-00001.safetensors", b"x" * 800), "800 bytes where 656 were"),
    "shorter": (lambda place, tag: place.write(f"{tag}/rank-00001.safetensors", b""), "0 bytes where 656 were written"),
    "missing": (lambda place, tag: place.remove(f"{tag}/rank-00000.safetensors"), "rank-00000.safetensors: missing"),
    "manifest": (lambda place, tag: place.write(f"{tag}/manifest.json", b"{"), "manifest.json: damaged"),
    "renamed": (lambda place, tag: place.write(f"{tag}/manifest.json", place.other), "holds the checkpoint of step 30"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tag_of_the_mirror_is_passed_over_and_alone_it_stops_the_run(
    store, empty, mirror, place, damage, said, caplog
):
    save(store, 10)
    save(store, 20)
    update_mirror(mirror, store, TWO, TAG_20)
    save(store, 30)
    place.other = (store.path(TAG_30) / "manifest.json").read_bytes()
    damage(place, TAG_20)
    assert said in mirror.faults(TAG_20)[0]
    assert restore_newest(empty, mirror).fetched.step == 10
    assert f"passing over a checkpoint of the mirror: {place.url}/{TAG_20}" in caplog.text
    assert said in caplog.text
    shutil.rmtree(empty.root)
    damage(place, TAG_10)
    with pytest.raises(CheckpointError, match=f"no checkpoint there is valid .*{said}") as caught:
        restore_newest(empty, mirror)
    assert caught.value.status is ExitStatus.USER_ERROR
    # The next commit mends what this node has.
    update_mirror(mirror, store, CheckpointSection(keep_last=3), TAG_30)
    if said in {"manifest.json: damaged", "holds the checkpoint of step 30"}:
        assert [mirror.faults(tag) for tag in (TAG_10, TAG_20, TAG_30)] == [[], [], []]


def test_a_fetch_goes_on_where_one_was_cut_off(store, empty, mirror, place):
    save(store, 10)
    update_mirror(mirror, store, TWO, TAG_10)
    staging = empty.staging(10, 1)
    shutil.copy(store.path(TAG_10) / "rank-00000.safetensors", staging)
    (staging / "rank-00001.safetensors").write_bytes(b"half")
    (staging / "rank-00007.safetensors.record.json").write_text("of a save at another size")
    place.remove(f"{TAG_10}/rank-00000.safetensors")  # so that it can only be taken from the disk
    assert restore_newest(empty, mirror).fetched.step == 10
    assert contents(empty, TAG_10) == contents(store, TAG_10)


def test_what_the_disk_has_newer_or_as_new_is_not_fetched(store, mirror, place):
    save(store, 10)
    update_mirror(mirror, store, TWO, TAG_10)
    for name in place.names():
        if name.endswith("safetensors"):
            place.remove(name)
    assert restore_newest(store, mirror).fetched is None
    save(store, 20)
    assert restore_newest(store, mirror).fetched is None


@pytest.mark.parametrize("damage", [flip_a_bit, lambda d: shutil.rmtree(d)])
def test_a_disk_whose_tags_are_bad_or_gone_gets_the_mirrors(store, mirror, damage):
    save(store, 10)
    save(store, 20)
    update_mirror(mirror, store, TWO, TAG_20)
    damage(store.path(TAG_20))
    assert restore_newest(store, mirror).fetched.step == 20
    assert store.newest_valid()[::2] == (TAG_20, [])
    for tag in (TAG_10, TAG_20):
        damage(store.path(tag))
    assert restore_newest(store, mirror).fetched.step == 20


def test_bad_tags_here_and_none_there_stop_the_run(store, mirror):
    save(store, 10)
    flip_a_bit(store.path(TAG_10))
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is valid"):
        restore_newest(store, mirror)


def test_a_start_that_was_overtaken_neither_uploads_nor_is_taken(store, empty, mirror, caplog):
    save(store, 10)
    update_mirror(mirror, store, TWO, TAG_10)
    save(store, 40)
    mirror.upload(store.path(TAG_40))  # by a rank that did not know
    restore_newest(empty, mirror)
    shutil.rmtree(empty.path(TAG_40))
    save(empty, 10, generation=1)
    save(empty, 20, generation=2)
    mirror.upload(empty.path(TAG_20))
    save(store, 30)
    update_mirror(mirror, store, TWO, TAG_30)
    assert "start 2 of the run, or another run, saves there, and this is start 1" in caplog.text
    assert mirror.tags() == [TAG_10, TAG_20, TAG_40]
    shutil.rmtree(empty.root)
    assert restore_newest(empty, mirror).fetched.step == 20
    assert f"{TAG_40}: saved by start 1 of the run after start 2 had gone on from a lower step" in caplog.text


def test_a_tag_of_another_start_is_replaced_and_never_half_of_each(store, mirror):
    save(store, 10, generation=1)
    update_mirror(mirror, store, TWO, TAG_10)
    save(store, 10, generation=2)
    update_mirror(mirror, store, TWO, TAG_10)
    assert mirror.manifest(TAG_10).generation == 2
    assert mirror.faults(TAG_10) == []


def test_a_metric_that_is_no_number_is_no_reason_to_upload_again(store, mirror, monkeypatch):
    save(store, 10, metrics={"val/loss": float("nan")})
    update_mirror(mirror, store, TWO, TAG_10)
    monkeypatch.setattr(Mirror, "upload", lambda *_: pytest.fail("it is there already"))
    update_mirror(mirror, store, TWO, TAG_10)


def test_a_tag_of_which_the_mirror_lost_a_file_goes_there_again(store, mirror, place):
    for step in (10, 20):
        save(store, step)
    update_mirror(mirror, store, TWO, TAG_20)
    place.remove(f"{TAG_10}/{rank_file_name(1)}")
    place.write(f"{TAG_20}/{rank_file_name(0)}", b"cut")
    assert mirror.incomplete(mirror.manifests()[0]) == [TAG_10, TAG_20]
    save(store, 30)
    update_mirror(mirror, store, CheckpointSection(keep_last=3), TAG_30)
    assert mirror.incomplete(mirror.manifests()[0]) == []
    assert [mirror.faults(tag) for tag in mirror.tags()] == [[], [], []]


def test_a_damaged_tag_of_the_disk_is_not_uploaded(store, mirror):
    for step in (10, 20, 30):
        save(store, step)
    truncate(store.path(TAG_20))
    update_mirror(mirror, store, CheckpointSection(keep_last=3), TAG_30)
    assert mirror.tags() == [TAG_10, TAG_30]


def test_a_tag_that_did_not_get_there_makes_no_older_one_go(store, mirror, caplog):
    save(store, 10)
    update_mirror(mirror, store, TWO, TAG_10)
    shutil.rmtree(store.path(TAG_10))
    save(store, 20)
    truncate(store.path(TAG_20))
    update_mirror(mirror, store, CheckpointSection(keep_last=1), TAG_20)
    assert f"{TAG_20}: damaged before it was uploaded, so nothing goes from there" in caplog.text
    assert mirror.tags() == [TAG_10]
    save(store, 30)
    update_mirror(mirror, store, TWO, TAG_30)
    assert mirror.tags() == [TAG_10, TAG_30]
    save(store, 40)
    update_mirror(mirror, store, TWO, TAG_40)
    assert mirror.tags() == [TAG_30, TAG_40]


def test_two_runs_of_one_name_do_not_touch_each_others_tags(store, empty, mirror, place, caplog):
    one, other = "1" * 32, "2" * 32
    save(store, 10)  # by a version that drew no ids: it may be of any run
    save(store, 20, run_id=one)
    update_mirror(mirror, store, TWO, TAG_20)
    save(empty, 10, generation=2, run_id=other)
    before = place.names()
    update_mirror(mirror, empty, CheckpointSection(keep_last=1), TAG_10)
    said = (
        f"{place.url}: {TAG_20} there is of run {one}, and this run is {other}: give it another checkpoint.mirror, or "
        "its run directory another name"
    )
    assert said in caplog.text
    assert place.names() == before
    assert mirror.manifest(TAG_10).generation == 1
    with pytest.raises(CheckpointError) as caught:
        restore_newest(empty, mirror, other)
    assert (str(caught.value), caught.value.status) == (said, ExitStatus.USER_ERROR)
    assert empty.tags() == [TAG_10]
    assert restore_newest(store, mirror, one) == (None, 1, one)
    shutil.rmtree(empty.root)
    found = restore_newest(empty, mirror)
    assert (found.fetched.step, found.run_id) == (20, one)


def test_the_newest_start_that_the_mirror_knows_of_is_told(store, empty, mirror):
    save(store, 10, generation=7)
    update_mirror(mirror, store, TWO, TAG_10)
    save(empty, 20, generation=1)
    assert restore_newest(empty, mirror) == (None, 7, "")


def test_a_tag_that_goes_before_or_while_it_is_uploaded_does_no_harm(store, mirror, place, monkeypatch, caplog):
    save(store, 10)
    save(store, 20)
    update_mirror(mirror, store, TWO, TAG_30)
    assert f"{TAG_30}: gone before it was uploaded" in caplog.text
    put = Mirror._put

    def put_and_prune(self, path, *arguments):
        put(self, path, *arguments)
        shutil.rmtree(store.path(TAG_10), ignore_errors=True)

    monkeypatch.setattr(mirror_module, "_FILES_AT_ONCE", 1)
    with monkeypatch.context() as patched:
        patched.setattr(
            Mirror, "_put", lambda self, path, *a: (put_and_prune if TAG_10 in path else put)(self, path, *a)
        )
        update_mirror(mirror, store, TWO, TAG_20)
    assert f"{TAG_10}/rank-00001.safetensors" in caplog.text
    assert mirror.tags() == [TAG_20]
    assert mirror.unfinished() == [TAG_10]
    update_mirror(mirror, store, TWO, TAG_20)
    assert place.tags() == [TAG_20]


def test_a_disk_that_takes_nothing_is_told(store, empty, mirror, monkeypatch):
    save(store, 10)
    update_mirror(mirror, store, TWO, TAG_10)
    empty.root.parent.mkdir(parents=True)
    empty.root.write_text("a file where the folder is to be")
    with pytest.raises(CheckpointError, match=f"{TAG_10} of the mirror cannot be written there: .*: make room"):
        restore_newest(empty, mirror)


@pytest.fixture
def outage(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port, where nobody listens
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-3")


def test_an_outage_costs_the_run_nothing_but_a_warning(outage, store, empty, caplog):
    save(store, 10)
    silent = Mirror("s3://bucket/runs/b16", patience_s=0.2)
    update_mirror(silent, store, TWO, TAG_10)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("s3://bucket/runs/b16 is behind: s3://bucket/runs/b16: ")
    assert "tried again after the next save" in line
    assert "\n" not in line
    assert restore_newest(store, silent).fetched is None
    assert f"going on from {TAG_10} without a look at the mirror" in caplog.text
    # With nothing on the disk nobody knows whether the run had begun.
    with pytest.raises(MirrorError, match="check the URL, the network") as caught:
        restore_newest(empty, silent)
    assert caught.value.status is ExitStatus.TRANSIENT
    with pytest.raises(MirrorError):
        silent.manifest(TAG_10)
    with pytest.raises(MirrorError):  # which says nothing of the checkpoint
        silent.faults(TAG_10)


def test_after_an_outage_all_that_is_missing_goes_and_what_went_is_not_sent_again(store, bucket, monkeypatch, caplog):
    mirror = Mirror(bucket, patience_s=5)
    sent: list[str] = []
    put = mirror._obstore.put

    def failing(store_, path, *arguments, **keywords):
        if path == f"{TAG_10}/rank-00001.safetensors" and sent.count(path) == 0:
            sent.append(path)
            raise mirror._obstore.exceptions.GenericError("Error performing PUT x in 1ms - the network is down")
        sent.append(path)
        return put(store_, path, *arguments, **keywords)

    monkeypatch.setattr(mirror._obstore, "put", failing)
    save(store, 10)
    update_mirror(mirror, store, TWO, TAG_10)
    assert "is behind: " in caplog.text
    assert "the network is down" in caplog.text
    assert mirror.tags() == []
    save(store, 20)
    update_mirror(mirror, store, TWO, TAG_20)
    assert mirror.tags() == [TAG_10, TAG_20]
    assert sent.count(f"{TAG_10}/rank-00000.safetensors") == 1
    assert sent.index(f"{TAG_20}/manifest.json") < sent.index(f"{TAG_10}/manifest.json")
    assert mirror.faults(TAG_10) == []


def test_a_mirror_that_has_a_newer_tag_and_does_not_give_it_is_worth_another_start(store, empty, bucket, monkeypatch):
    mirror = Mirror(bucket, patience_s=1)
    save(store, 10)
    save(store, 20)
    update_mirror(mirror, store, TWO, TAG_20)

    def failing(*_):
        raise MirrorError("gone while reading")

    monkeypatch.setattr(Mirror, "_read_file", failing)
    with pytest.raises(MirrorError, match="gone while reading"):
        restore_newest(empty, mirror)
    assert empty.tags() == []


@pytest.mark.parametrize(
    ("answer", "status"),
    [(401, ExitStatus.USER_ERROR), (403, ExitStatus.USER_ERROR), (503, ExitStatus.TRANSIENT)],
)
def test_only_what_may_pass_is_worth_another_start(outage, empty, monkeypatch, answer, status):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(MirrorError, match=r"^s3://bucket/runs/b16: .*check the URL") as caught:
            restore_newest(empty, Mirror("s3://bucket/runs/b16", patience_s=0.2))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert caught.value.status is status
    assert pickle.loads(pickle.dumps(caught.value)).status is status  # as the other ranks get it


def test_a_refusal_is_one_line(bucket, store, monkeypatch):
    missing = Mirror("s3://no-such-bucket/runs/b16", patience_s=1)
    save(store, 10)
    with pytest.raises(CheckpointError) as caught:
        missing.upload(store.path(TAG_10))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=f"{TAG_10}: no manifest.json"):
        missing.upload(store.root / "nowhere" / TAG_10)


def test_a_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    tree = micro_tree(tmp_path / "dataset", tmp_path / "b16")
    config = Config.model_validate(tree)
    assert mirror_of(config) is None
    mirrored = Config.model_validate(tree | {"checkpoint": {"mirror": "s3://bucket/runs/"}})
    assert mirror_of(mirrored).url == "s3://bucket/runs/b16"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for odd, name in ((Path(), tmp_path.name), (Path("x/y/.."), "x"), (Path("link"), "link")):
        run = mirrored.run.model_copy(update={"dir": odd})
        assert mirror_of(mirrored.model_copy(update={"run": run})).url == f"s3://bucket/runs/{name}"


@pytest.mark.parametrize("missing", ["obstore", "tenacity"])
def test_without_the_client_the_mend_is_told(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "vitscale.data.remote", raising=False)
    with pytest.raises(
        ConfigError,
        match=rf"^s3://bucket/runs/b16: a mirror of checkpoints needs {missing}, .* pip install 'vitscale\[remote\]'",
    ):
        Mirror("s3://bucket/runs/b16")


@pytest.mark.parametrize("obstacle", ["file", "dangling", "loop"])
def test_what_is_no_folder_is_not_a_mirror_without_tags(empty, tmp_path, obstacle):
    path = tmp_path / "far"
    path.write_text("") if obstacle == "file" else path.symlink_to("far" if obstacle == "loop" else "not-mounted")
    with pytest.raises(MirrorError, match=r"far: .*Not a directory: check the URL") as told:
        restore_newest(empty, Mirror(f"file://{path}"))
    assert told.value.status == ExitStatus.USER_ERROR


@pytest.mark.parametrize("url", ["s3:///x", "s3://[/x", "file://host/x", "bogus://x/y"])
def test_a_url_that_no_client_takes_is_told_and_not_tried_again(url):
    with pytest.raises(MirrorError) as caught:
        Mirror(url).tags()
    assert str(caught.value).startswith(f"{url}: ")
    assert caught.value.status is ExitStatus.USER_ERROR
