"""Downloads: once, whole, the right bytes, and one clear line where that cannot be."""

import hashlib
import io
import json
import logging
import os
import re
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from urllib.error import URLError
from urllib.request import OpenerDirector

import pytest
from distributed_runner import forkserver_context

import vitscale.checkpoint.download as download
from vitscale.checkpoint.download import fetch
from vitscale.errors import CheckpointError, ConfigError

CONTENT = bytes(range(256)) * 4000
CHANGED = CONTENT[::-1]
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = b64encode(hashlib.md5(CONTENT).digest()).decode()


class Remote(ThreadingHTTPServer):
    """A server of one file under every path, with the faults that a test asks for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.last_modified: str | None = "Mon, 01 Jan 2024 00:00:00 GMT"
        self.extra: list[tuple[str, str]] = []
        self.takes_ranges = self.heeds_if_range = self.tells_length = True
        self.statuses: list[int] = []  # of the next answers; the rest is good
        self.cuts: list[int] = []  # bytes after which the next bodies end
        self.location = ""
        self.held = threading.Event()  # a body stops half-way, and headers do not come, until it is set
        self.held.set()
        self.holds_headers = False
        self.asked: list[dict[str, str]] = []  # headers of all requests

    def url(self, name: str = "weights.npz") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def change(self, content: bytes) -> None:
        self.content, self.etag, self.last_modified = content, '"two"', "Tue, 02 Jan 2024 00:00:00 GMT"


class Answer(BaseHTTPRequestHandler):
    server: Remote

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        remote = self.server
        remote.asked.append(dict(self.headers))
        if remote.holds_headers:
            remote.held.wait()
        if remote.statuses:
            self.send_response(remote.statuses.pop(0))
            self.send_header("Location", remote.location)
            self.end_headers()
            return
        start, total = self.first_byte(), len(remote.content)
        if start and start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.describe(remote.content[start or 0 :])

    def first_byte(self) -> int | None:
        """Where the asked range starts; None for the whole file."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        valid = {None, self.server.etag, self.server.last_modified}
        unchanged = self.headers.get("If-Range") in valid or not self.server.heeds_if_range
        return int(asked[1]) if asked and self.server.takes_ranges and unchanged else None

    def describe(self, body: bytes) -> None:
        remote = self.server
        sent = {"ETag": remote.etag, "Last-Modified": remote.last_modified}
        if remote.tells_length:
            sent["Content-Length"] = str(len(body))
        for key, value in [*sent.items(), *remote.extra]:
            if value:
                self.send_header(key, value)
        self.end_headers()
        body = body[: remote.cuts.pop(0)] if remote.cuts else body
        half = len(body) // 2
        try:
            self.wfile.write(body[:half])
            remote.held.wait()
            self.wfile.write(body[half:])
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed, or timed out


@pytest.fixture
def remote():
    server = Remote()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.held.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch, caplog) -> list[float]:
    """Nothing waits, and no setting of the machine gets in; gives the seconds that would have been waited."""
    seconds: list[float] = []
    monkeypatch.setattr(download, "sleep", seconds.append)
    for name in ("VITSCALE_CACHE", "VITSCALE_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    caplog.set_level(logging.INFO, logger=download.__name__)
    return seconds


def refusal(url: str, cache: Path | None, **options) -> str:
    """The error of a fetch: one line, without another's traceback, and nothing that would count as cached."""
    with pytest.raises(CheckpointError) as caught:
        fetch(url, cache_dir=cache, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def left(cache: Path) -> set[str]:
    """Endings of the files in a cache of one URL, by which they are told apart."""
    return {re.sub(r"^[0-9a-f]{12}-[^.]*\.[^.]*", "", path.name) for path in (cache / "weights").iterdir()}


def ranges(remote: Remote) -> list[str | None]:
    return [headers.get("Range") for headers in remote.asked]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_is_downloaded_once_with_a_record_of_what_it_is(remote, tmp_path):
    path = fetch(remote.url(), cache_dir=tmp_path)
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == {"", ".json", ".lock"}
    record = json.loads(path.with_name(path.name + ".json").read_text())
    assert (record["url"], record["size_bytes"], record["sha256"]) == (remote.url(), len(CONTENT), SHA256)
    assert (record["etag"], record["last_modified"]) == (remote.etag, remote.last_modified)
    assert fetch(remote.url(), cache_dir=tmp_path) == path
    assert [headers["User-Agent"] for headers in remote.asked] == ["vitscale"]  # some servers refuse Python's own


def test_urls_with_the_same_last_part_have_files_of_their_own(remote, tmp_path):
    one = fetch(remote.url("one/weights.npz"), cache_dir=tmp_path)
    remote.content = CHANGED
    other = fetch(remote.url("other/weights.npz"), cache_dir=tmp_path)
    assert (one.read_bytes(), other.read_bytes()) == (CONTENT, CHANGED)
    digits = hashlib.sha256(remote.url("one/weights.npz").encode()).hexdigest()[:12]
    assert one == tmp_path / "weights" / f"{digits}-weights.npz"


@pytest.mark.parametrize(
    ("last_part", "name"),
    [
        ("a%20b%22.pth", "a_b_.pth"),
        ("%2e%2e%2f%2e%2e%2fetc%2fevil.pth", "evil.pth"),
        ("..%5cevil.pth", "evil.pth"),
        ("%C3%A9%00.pth", "__.pth"),
        ("%2e%2e", ".."),
        ("weights.npz?download=true#top", "weights.npz"),
        ("folder/", "folder"),
        ("", "file"),
        ("n" * 300 + ".safetensors", "n" * 138 + ".safetensors"),
    ],
)
def test_a_name_is_made_safe_and_keeps_its_suffix(remote, tmp_path, last_part, name):
    path = fetch(remote.url(last_part), cache_dir=tmp_path)
    assert path.parent == tmp_path / "weights"
    assert re.fullmatch(r"[0-9a-f]{12}-" + re.escape(name), path.name)


def test_the_cache_is_the_argument_then_the_variables_then_the_home(remote, tmp_path, monkeypatch):
    def folder(**options) -> Path:
        return fetch(remote.url(), **options).parent

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert folder() == tmp_path / "home/.cache/vitscale/weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg/vitscale/weights"
    monkeypatch.setenv("VITSCALE_CACHE", "~/named")
    assert folder() == tmp_path / "home/named/weights"
    assert folder(cache_dir=tmp_path / "given") == tmp_path / "given/weights"


def test_without_a_home_the_cache_has_to_be_named(monkeypatch):
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(ConfigError, match=r"no folder for the cache.*VITSCALE_CACHE"):
        fetch("http://host/weights.npz")


def _truncate(path: Path) -> None:
    os.truncate(path, len(CONTENT) - 1)


def _flip_a_bit(path: Path) -> None:
    path.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


DAMAGE = [
    (_truncate, "bytes where"),
    (_flip_a_bit, "SHA-256"),
    (lambda path: _record(path).unlink(), "missing"),
    (lambda path: _record(path).write_text("{"), "damaged"),
    (lambda path: _record(path).write_text('{"url": "http://host/weights.npz"}'), "damaged"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_a_damaged_file_is_said_and_downloaded_again(remote, tmp_path, caplog, damage, said):
    path = fetch(remote.url(), cache_dir=tmp_path)
    damage(path)
    caplog.clear()
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(remote.asked) == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert said in warnings[0]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_a_damaged_file_is_refused_when_offline(remote, tmp_path, damage, said):
    path = fetch(remote.url(), cache_dir=tmp_path)
    damage(path)
    assert said in refusal(remote.url(), tmp_path, offline=True)
    assert len(remote.asked) == 1


def test_offline_takes_from_the_cache_only_and_says_where_to_put_the_file(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("VITSCALE_OFFLINE", "1")
    line = refusal(remote.url(), tmp_path)
    path = fetch(remote.url(), cache_dir=tmp_path, offline=False)
    assert f"{remote.url()} is not in the cache" in line
    assert "VITSCALE_OFFLINE is set: fetch it on a machine with a network" in line
    assert f"put the file at {path} and name the path" in line
    assert fetch(remote.url(), cache_dir=tmp_path) == path
    assert len(remote.asked) == 1


@pytest.mark.parametrize("value", ["", "0"])
def test_an_empty_variable_or_0_is_not_offline_but_the_argument_is(remote, tmp_path, monkeypatch, value):
    monkeypatch.setenv("VITSCALE_OFFLINE", value)
    assert "and offline is set" in refusal(remote.url(), tmp_path, offline=True)
    assert not remote.asked
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT


def test_a_file_url_is_copied_offline_too_and_held_to_its_digest(tmp_path):
    source = tmp_path / "my weights.npz"
    source.write_bytes(CONTENT)
    path = fetch(source.as_uri(), cache_dir=tmp_path / "cache", offline=True)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-my_weights.npz")
    wrong = tmp_path / "weights-00000000.npz"
    wrong.write_bytes(CONTENT)
    assert "00000000" in refusal(wrong.as_uri(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/weights.npz", "not a URL of http"),
        ("weights.npz", "not a URL of http"),
        ("http://host/my weights.npz", "%20"),
        ("http://host/weights\n.npz", "not a URL of http"),
        ("http://[::1/weights.npz", "Invalid IPv6 URL"),
        ("http://127.0.0.1:port/weights.npz", "not a usable URL: nonnumeric port"),
        ("http:///weights.npz", "no host given"),
        ("file:///tmp/%00weights.npz", "not a usable URL"),
        ("file:///no/such/weights.npz", "weights.npz: No such file or directory: check"),
        ("file:///", "Is a directory"),
        ("file://elsewhere.invalid/", "local"),
    ],
)
def test_what_cannot_be_fetched_is_refused_at_once(tmp_path, monkeypatch, waits, url, said):
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "192.0.2.1" if "invalid" in host else "127.0.0.1")
    assert said in refusal(url, tmp_path)
    assert not waits


def test_a_cut_connection_is_taken_up_where_it_broke(remote, tmp_path, waits):
    remote.cuts = [1000, 50_000]
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote) == [None, "bytes=1000-", "bytes=51000-"]
    assert [headers.get("If-Range") for headers in remote.asked] == [None, '"one"', '"one"']
    assert len(waits) == 2
    assert left(tmp_path) == {"", ".json", ".lock"}


def test_a_connection_that_breaks_each_time_is_given_up_and_taken_up_by_the_next_run(remote, tmp_path, waits):
    remote.cuts = [1000] * 4
    line = refusal(remote.url(), tmp_path)
    assert f"4000 of {len(CONTENT)} bytes came (4 tries)" in line
    assert len(waits) == 3
    assert left(tmp_path) == {".part", ".part.json", ".lock"}
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote)[-1] == "bytes=4000-"


@pytest.mark.parametrize("heeds_if_range", [True, False])
@pytest.mark.parametrize("tells_etag", [True, False])
@pytest.mark.parametrize("content", [CHANGED + b"more", CONTENT[:500]])  # longer, and shorter than what is there
def test_a_file_that_changed_on_the_server_starts_over(remote, tmp_path, heeds_if_range, tells_etag, content):
    remote.heeds_if_range = heeds_if_range
    remote.cuts = [1000] * 4
    refusal(remote.url(), tmp_path)
    remote.change(content)
    if not tells_etag:
        remote.etag = None
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == content
    assert ranges(remote)[4:] == (["bytes=4000-"] if heeds_if_range else ["bytes=4000-", None])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"content": CHANGED, "etag": '"two"'}, id="ETag"),
        pytest.param({"content": CHANGED, "etag": None}, id="no ETag any more"),
        pytest.param({"content": CHANGED, "last_modified": "Tue, 02 Jan 2024 00:00:00 GMT"}, id="date"),
        pytest.param({"content": CHANGED + b"more"}, id="size"),
    ],
)
def test_where_if_range_is_not_heeded_one_mark_of_another_file_is_enough(remote, tmp_path, change):
    remote.heeds_if_range = False
    remote.cuts = [1000] * 4
    refusal(remote.url(), tmp_path)
    vars(remote).update(change)
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == change["content"]
    assert ranges(remote)[4:] == ["bytes=4000-", None]


def test_a_range_that_starts_elsewhere_is_not_joined_on(remote, tmp_path, monkeypatch):
    remote.cuts = [1000]
    monkeypatch.setattr(Answer, "first_byte", lambda self: 7 if self.headers.get("Range") else None)
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote) == [None, "bytes=1000-", None]


def test_part_of_a_file_that_was_not_asked_for_is_not_taken_for_it(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(Answer, "first_byte", lambda self: 7)
    assert "another file" in refusal(remote.url(), tmp_path)
    assert left(tmp_path) == {".lock"}


def test_a_server_that_ignores_ranges_sends_all_of_it_again(remote, tmp_path):
    remote.takes_ranges = False
    remote.cuts = [1000]
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote) == [None, "bytes=1000-"]


@pytest.mark.parametrize(
    ("etag", "last_modified", "if_range"),
    [
        ('W/"weak"', "Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:00 GMT"),
        (None, "Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ('W/"weak"', None, None),
        (None, None, None),
    ],
)
def test_only_what_identifies_the_bytes_is_resumed_by(remote, tmp_path, etag, last_modified, if_range):
    remote.etag, remote.last_modified = etag, last_modified
    remote.cuts = [1000]
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert remote.asked[1].get("If-Range") == if_range
    assert ("Range" in remote.asked[1]) == (if_range is not None)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_a_part_that_nothing_is_known_of_is_not_gone_on_with(remote, tmp_path, damage):
    remote.cuts = [1000] * 4
    refusal(remote.url(), tmp_path)
    damage(next(tmp_path.glob("weights/*.part.json")))
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote)[-1] is None


def test_a_part_that_is_gone_is_no_hindrance(remote, tmp_path):
    remote.cuts = [1000] * 4
    refusal(remote.url(), tmp_path)
    next(tmp_path.glob("weights/*.part")).unlink()
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote)[-1] is None


def test_a_date_that_a_partial_answer_leaves_out_is_no_change(remote, tmp_path):
    remote.cuts = [1000] * 4
    refusal(remote.url(), tmp_path)
    remote.last_modified = None
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote)[4:] == ["bytes=4000-"]


def test_a_cut_in_a_body_of_chunks_starts_over(remote, tmp_path, caplog):
    remote.tells_length, remote.extra = False, [("Transfer-Encoding", "chunked")]
    remote.content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(CONTENT), CONTENT)
    remote.cuts = [1000]
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert "the connection broke: IncompleteRead" in caplog.text
    assert ranges(remote) == [None, None]


def test_a_file_of_unknown_length_is_fetched_once_too(remote, tmp_path, caplog):
    remote.tells_length = False
    fetch(remote.url(), cache_dir=tmp_path)
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(remote.asked) == 1
    assert "of unknown size" in caplog.text


def test_a_run_that_ended_just_before_the_rename_left_nothing_to_download(remote, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download, "_check_content", lambda *_: sys.exit("cut off"))
        with pytest.raises(SystemExit):
            fetch(remote.url(), cache_dir=tmp_path)
    assert left(tmp_path) == {".part", ".part.json", ".lock"}
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(remote.asked) == 1


@pytest.mark.parametrize("name", [f"net-{SHA256[:8]}.pth", f"net-{SHA256[:12].upper()}.pth", f"a-b-{SHA256}.pth.tar"])
def test_a_digest_in_the_name_that_fits_is_taken(remote, tmp_path, name):
    assert fetch(remote.url(name), cache_dir=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["net-a1311bcf.pth", "net-A1311BCF.pth", f"a-b-{'0' * 64}.pth.tar"])
def test_a_digest_in_the_name_that_does_not_fit_removes_the_download(remote, tmp_path, name):
    line = refusal(remote.url(name), tmp_path)
    assert f"{remote.url(name)}: its name promises a SHA-256 of {name.split('-')[-1].split('.')[0]}" in line
    assert SHA256 in line
    assert left(tmp_path) <= {".lock", ".tar.lock"}


@pytest.mark.parametrize(
    "name",
    ["a1311bcf.pth", "net-a1311bc.pth", "net-20210928.pth", "net-a1311bcf.v-2.pth", "net-a1311bcf", "net_a1311bcf.pth"],
)
def test_other_names_promise_no_digest(remote, tmp_path, name):
    assert fetch(remote.url(name), cache_dir=tmp_path).read_bytes() == CONTENT


WRONG_MD5 = b64encode(b"0" * 16).decode()


@pytest.mark.parametrize(
    "form", [["crc32c=n03x6A==", "md5={}"], ["md5={},crc32c=n03x6A=="], ["crc32c=n03x6A==, md5={}"]]
)
def test_the_md5_of_google_cloud_storage_is_held_to(remote, tmp_path, form):
    remote.extra = [("x-goog-hash", value.format(WRONG_MD5)) for value in form]
    line = refusal(remote.url(), tmp_path)
    assert f"{remote.url()}: the server promises an MD5 of {WRONG_MD5}, found {MD5}" in line
    assert left(tmp_path) == {".lock"}
    remote.extra = [("x-goog-hash", value.format(MD5)) for value in form]
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT


def test_the_md5_of_the_first_answer_holds_for_a_resumed_download(remote, tmp_path):
    remote.extra = [("x-goog-hash", f"md5={WRONG_MD5}")]
    remote.cuts = [1000] * 4
    refusal(remote.url(), tmp_path)
    remote.extra = []
    assert WRONG_MD5 in refusal(remote.url(), tmp_path)
    assert ranges(remote)[-1] == "bytes=4000-"


def test_a_hash_without_an_md5_is_passed_over(remote, tmp_path):
    remote.extra = [("x-goog-hash", "crc32c=n03x6A==")]
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT


def test_errors_of_the_server_are_tried_again_after_growing_waits(remote, tmp_path, waits, caplog):
    remote.statuses = [500, 503, 429]
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(remote.asked) == 4
    assert len(waits) == 3
    assert all(base / 2 <= wait_s <= base for base, wait_s in zip([2, 4, 8], waits, strict=True))
    assert "HTTP 503 Service Unavailable: trying again" in caplog.text


def test_waits_are_not_the_same_for_all_clients(remote, tmp_path, waits):
    remote.statuses = [500, 500]
    fetch(remote.url("one"), cache_dir=tmp_path)
    remote.statuses = [500, 500]
    fetch(remote.url("two"), cache_dir=tmp_path)
    assert waits[:2] != waits[2:]


def test_tries_are_bounded(remote, tmp_path):
    remote.statuses = [500] * 9
    assert "HTTP 500 Internal Server Error (4 tries)" in refusal(remote.url(), tmp_path)
    assert len(remote.asked) == 4


@pytest.mark.parametrize("status", [401, 404, 416])
def test_a_refusal_by_the_server_is_told_at_once(remote, tmp_path, waits, status):
    remote.statuses = [status]
    assert f"{remote.url()}: HTTP {status}" in refusal(remote.url(), tmp_path)
    assert len(remote.asked) == 1
    assert not waits


def test_a_redirect_is_followed_with_the_range(remote, tmp_path):
    remote.location = remote.url("elsewhere/weights.npz")
    remote.cuts = [1000]
    remote.statuses = [302]
    fetch(remote.url(), cache_dir=tmp_path)
    remote.statuses = [302]
    remote.cuts = [1000] * 4
    refusal(remote.url("other"), tmp_path)
    assert ranges(remote)[3:] == [None, None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]
    remote.statuses = [307]
    assert fetch(remote.url("other"), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote)[-2:] == ["bytes=4000-"] * 2


@pytest.mark.parametrize("location", ["file://{}", "ftp://127.0.0.1{}", "data:text/plain,hello"])
def test_a_redirect_away_from_http_is_refused(remote, tmp_path, waits, location):
    secret = tmp_path / "secret"
    secret.write_text("not to be read")
    remote.statuses, remote.location = [302], location.format(secret)
    line = refusal(remote.url(), tmp_path)
    assert "not allowed" in line or "unknown url type" in line
    assert left(tmp_path) == {".lock"}
    assert not waits


def test_a_redirect_in_a_circle_is_one_line(remote, tmp_path):
    remote.statuses, remote.location = [302] * 99, remote.url()
    assert "infinite loop" in refusal(remote.url(), tmp_path)


def test_a_refused_connection_names_the_host_the_cache_and_the_mend(tmp_path, waits):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        line = refusal(f"http://127.0.0.1:{unused.getsockname()[1]}/weights.npz", tmp_path)
    assert "127.0.0.1 is out of reach" in line
    assert "Connection refused; 4 tries" in line
    assert f"copy its cache to {tmp_path / 'weights'}" in line
    assert len(waits) == 3


def test_an_unknown_host_is_named(tmp_path, monkeypatch):
    def nowhere(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    assert "weights.example is out of reach" in refusal("https://weights.example/vit.npz", tmp_path)


def test_a_server_that_says_nothing_times_out(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.1)
    remote.held.clear()
    remote.holds_headers = True
    started_s = time.monotonic()
    assert "no usable answer: timed out (4 tries)" in refusal(remote.url(), tmp_path)
    assert time.monotonic() - started_s < 4


def test_a_body_that_stops_times_out_and_is_gone_on_with(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.5)
    monkeypatch.setattr(download, "sleep", lambda _: remote.held.set())
    monkeypatch.setattr(download, "_CHUNK_BYTES", 1000)
    remote.held.clear()
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote) == [None, f"bytes={len(CONTENT) // 2}-"]


def test_an_answer_that_is_not_http_is_tried_again(remote, tmp_path, monkeypatch, waits):
    monkeypatch.setattr(Answer, "do_GET", lambda self: self.wfile.write(b"220 ftp ready\r\n"))
    assert "no usable answer: 220 ftp ready (4 tries)" in refusal(remote.url(), tmp_path)
    assert len(waits) == 3


@pytest.mark.parametrize(
    "reason",
    [ssl.SSLCertVerificationError("certificate verify failed"), PermissionError(13, "Permission denied")],
)
def test_what_waiting_does_not_mend_is_told_at_once(tmp_path, monkeypatch, waits, reason):
    def refuse(*_, **__):
        raise URLError(reason)

    monkeypatch.setattr(OpenerDirector, "open", refuse)
    assert reason.args[-1] in refusal("https://host/weights.npz", tmp_path)
    assert not waits


def test_a_cache_that_cannot_be_made_is_named(remote, tmp_path):
    (tmp_path / "weights").write_text("a file")
    line = refusal(remote.url(), tmp_path)
    assert str(tmp_path / "weights") in line
    assert "VITSCALE_CACHE" in line


def test_a_disk_that_takes_no_more_is_not_tried_again(remote, tmp_path, waits):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    remote.content = bytes(4 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))
    try:
        line = refusal(remote.url(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large: make room" in line
    assert str(tmp_path) in line
    assert len(remote.asked) == 1
    assert not waits


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_and_a_log_file_has_lines(remote, tmp_path, monkeypatch, caplog, capsys):
    path = fetch(remote.url(), cache_dir=tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{remote.url()}: downloading, 1.02MB, from byte 0",
        f"{path}: downloaded, 1.02MB",
    ]
    assert capsys.readouterr().err == ""
    caplog.clear()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    remote.cuts = [len(CONTENT) // 2]
    fetch(remote.url("other.npz"), cache_dir=tmp_path)
    assert "other.npz:  50%" in terminal.getvalue()
    assert "other.npz: 100%" in terminal.getvalue()
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # of the cut


def _fetch(url: str, cache: Path, told: Path) -> None:
    download._CHUNK_BYTES = 64_000
    told.write_text(str(fetch(url, cache_dir=cache)))


def start(url: str, cache: Path, told: Path) -> BaseProcess:
    """Another process that downloads a file and writes down where it is."""
    process = forkserver_context().Process(target=_fetch, args=(url, cache, told))
    process.start()
    return process


def size_of_part(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.glob("weights/*.part"))


def test_a_killed_download_is_finished_by_the_next_run(remote, tmp_path):
    remote.held.clear()
    process = start(remote.url(), tmp_path, tmp_path / "told")
    try:
        wait_for(lambda: size_of_part(tmp_path) >= len(CONTENT) // 2)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    remote.held.set()
    assert fetch(remote.url(), cache_dir=tmp_path).read_bytes() == CONTENT
    assert ranges(remote) == [None, f"bytes={len(CONTENT) // 2}-"]


def test_of_two_processes_one_downloads_and_the_other_waits_for_it(remote, tmp_path, caplog):
    remote.held.clear()
    process = start(remote.url(), tmp_path, tmp_path / "told")
    with ThreadPoolExecutor() as pool:
        try:
            wait_for(lambda: size_of_part(tmp_path) >= len(CONTENT) // 2)
            waiting = pool.submit(fetch, remote.url(), cache_dir=tmp_path)
            wait_for(lambda: "waiting for the process" in caplog.text)
        finally:
            remote.held.set()
            process.join(60)
        path = waiting.result(timeout=60)
    assert (tmp_path / "told").read_text() == str(path)
    assert path.read_bytes() == CONTENT
    assert len(remote.asked) == 1
