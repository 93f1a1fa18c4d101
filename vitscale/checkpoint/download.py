"""Files behind a URL, downloaded once into the user's cache.

CACHE/weights/3f0c9a51be77-ViT-H_14.npz             the file; only its record makes it count
              3f0c9a51be77-ViT-H_14.npz.json        the record: where it came from, its size and SHA-256
              3f0c9a51be77-ViT-H_14.npz.part        a download under way, or one that was cut off
              3f0c9a51be77-ViT-H_14.npz.part.json   what the server said of it, so that a later try goes on with it
              3f0c9a51be77-ViT-H_14.npz.lock        held by the process that downloads

CACHE is `config.cache.cache_folder`.
"""

import fcntl
import hashlib
import logging
import os
import random
import re
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, InvalidURL
from pathlib import Path
from ssl import SSLCertVerificationError
from time import sleep
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.response import addinfourl

from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from vitscale.checkpoint.integrity import check_file, record_file
from vitscale.checkpoint.manifest import FileRecord
from vitscale.config.cache import CACHE_VARIABLE, cache_folder
from vitscale.errors import CheckpointError

log = logging.getLogger(__name__)

OFFLINE_VARIABLE = "VITSCALE_OFFLINE"
"""Environment variable: when neither empty nor 0, nothing is asked of a network."""

_TRIES = 4
_TIMEOUT_S = 30.0  # of one connect, send or receive
_BACKOFF_S = 2.0
_CHUNK_BYTES = 1 << 18
_BUSY = {408, 429}  # the statuses below 500 that ask for another try
# Not to be mended by another try; a plain text is urllib's own refusal.
_HOPELESS = (str, SSLCertVerificationError, FileNotFoundError, IsADirectoryError, PermissionError)
_USABLE = re.compile(r"(?:https?|file)://[!-~]+", re.IGNORECASE)
# torch.hub's habit: a dash and the first digits of the SHA-256 end the name. A date (20210928) has eight digits too.
# The first dash is the one that follows the URL's own digits in the cache.
_DATE = r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\."
_NAMED_SHA256 = re.compile(rf"-.*-(?!{_DATE})([0-9a-f]{{8,64}})\.[^-]*$", re.IGNORECASE)
# Picked by hand, to leave ftp out: urllib's own choice would follow a redirect to it.
_HANDLERS = (
    *(request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler, request.FileHandler),
    *(request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor),
)


class _Source(BaseModel):
    """What a server says of a file, and once that is cached, its own size and SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    size_bytes: int | None = None
    sha256: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    md5: str | None = None
    """In base64, as Google Cloud Storage gives it."""

    @property
    def validator(self) -> str | None:
        """What If-Range may carry: a weak ETag promises equal meaning, not equal bytes."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


class _TransientError(Exception):
    """Worth another try; `unreachable` when not even a connection came about."""

    def __init__(self, reason: str, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


def fetch(url: str, *, cache_dir: Path | None = None, offline: bool | None = None) -> Path:
    """The file behind an http, https or file URL, in the cache; downloaded if it is not there, once for all processes.

    Args:
        url: its last part names the file. `name-a1311bcf.pth` is held to its SHA-256.
        cache_dir: the cache; by default what the environment says (see the module).
        offline: take http and https URLs from the cache only; by default what VITSCALE_OFFLINE says.

    Raises:
        CheckpointError: not such a URL, not in the cache when offline, out of reach, refused by the server, not the
            expected content, or a cache that cannot be written.
        ConfigError: there is no folder for the cache.
    """
    path = (cache_dir or cache_folder()) / "weights" / _name_of(url)
    told = OFFLINE_VARIABLE if offline is None else "offline"
    if offline is None:
        offline = os.environ.get(OFFLINE_VARIABLE, "") not in {"", "0"}
    try:
        fault = _fault(path)
        if fault is None:  # found without a lock: the cache may be one that is only to be read
            return path
        if offline and not url.lower().startswith("file:"):
            raise CheckpointError(
                f"{url} is not in the cache ({fault}) and {told} is set: "
                f"fetch it on a machine with a network, or put the file at {path} and name the path"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            fault = _fault(path)
            if fault is None:
                return path
            if path.exists():
                log.warning("%s: downloading it again", fault)
            _download(url, path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: {error.strerror or error}: make room or mend the rights, "
            f"or name another folder in {CACHE_VARIABLE}"
        ) from None
    return path


def _name_of(url: str) -> str:
    """Name in the cache; what is too long loses its head, never its suffix."""
    try:
        location = urlsplit(url).path.rstrip("/")
    except ValueError as error:
        raise CheckpointError(f"{url!r}: not a URL: {error}") from None
    if not _USABLE.fullmatch(url):
        raise CheckpointError(f"{url!r}: not a URL of http://, https:// or file:// (a space is written %20)")
    name = re.sub(r"[^\w.-]", "_", re.split(r"[/\\]", unquote(location))[-1], flags=re.ASCII)
    return f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name[-150:] or 'file'}"


def _fault(path: Path) -> str | None:
    """Why a file does not count as cached; None when it is the one that was recorded."""
    record_path = Path(f"{path}.json")
    try:
        record = _Source.model_validate_json(record_path.read_bytes())
        check_file(path, FileRecord(name=path.name, **record.model_dump(include={"size_bytes", "sha256"})))
    except FileNotFoundError:
        return f"{record_path if path.exists() else path}: missing"
    except ValidationError:
        return f"{record_path}: damaged"
    except CheckpointError as error:
        return str(error)
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with Path(f"{path}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for the process that downloads it", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path) -> None:
    part = Path(f"{path}.part")
    for failures in range(1, _TRIES + 1):
        try:
            source = _transfer(url, part)
            break
        except _TransientError as error:
            if failures < _TRIES:
                wait_s = _BACKOFF_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0)  # noqa: S311
                log.warning("%s: %s: trying again in %.1f s", url, error, wait_s)
                sleep(wait_s)
                continue
            if error.unreachable:
                raise CheckpointError(
                    f"{url}: {urlsplit(url).hostname} is out of reach ({error}; {_TRIES} tries): fetch it on a machine "
                    f"with a network and copy its cache to {path.parent}, or name the path of a copy"
                ) from None
            raise CheckpointError(f"{url}: {error} ({_TRIES} tries): run again, it goes on from {part}") from None
    found = record_file(part)
    _check_content(part, found, source)
    # The record goes first: a cut between the two leaves a whole .part, which the next try takes up.
    _write(Path(f"{path}.json"), source.model_copy(update={"size_bytes": found.size_bytes, "sha256": found.sha256}))
    part.replace(path)
    _discard(part)
    _say("%s: downloaded, %s", path, tqdm.format_sizeof(found.size_bytes, "B"))


def _check_content(part: Path, found: FileRecord, source: _Source) -> None:
    named = _NAMED_SHA256.search(part.stem)
    wrong = ""
    if named and not found.sha256.startswith(named[1].lower()):
        wrong = f"its name promises a SHA-256 of {named[1]}..., found {found.sha256}"
    elif source.md5:
        with part.open("rb") as file:
            md5 = b64encode(hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()).decode()
        if md5 != source.md5:
            wrong = f"the server promises an MD5 of {source.md5}, found {md5}"
    if wrong:
        _discard(part)
        raise CheckpointError(f"{source.url}: {wrong}: removed; try again, or name the path of a sound copy")


def _transfer(url: str, part: Path) -> _Source:
    """One try to complete `part`; it goes on from what is there if the server still has the same file."""
    known, offset, headers = _left_over(part), 0, {"User-Agent": "vitscale"}
    if known and known.validator:  # without one, the rest could be another file's
        offset = part.stat().st_size
        if offset == known.size_bytes:
            return known
        headers |= {"Range": f"bytes={offset}-", "If-Range": known.validator}
    with _open(url, headers) as response:
        if response.status in {206, 416}:
            if known is None or not _goes_on(response, known, offset):
                _discard(part)
                raise _TransientError("the server has another file than the one that was begun: starting over")
            source = known
        else:
            source, offset = _source_of(url, response), 0
            _discard(part)
            _write(Path(f"{part}.json"), source)
        _copy(response, part, offset, source)
    return source


def _left_over(part: Path) -> _Source | None:
    try:
        known = _Source.model_validate_json(Path(f"{part}.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return known if part.exists() and known.size_bytes is not None else None


def _goes_on(response: addinfourl, known: _Source, offset: int) -> bool:
    """Whether a partial response is the rest of the known file: not every server heeds If-Range."""
    headers = response.headers
    same = headers.get("ETag") == known.etag and headers.get("Last-Modified") in {None, known.last_modified}
    answer = headers.get("Content-Range") or ""
    return same and re.fullmatch(rf"bytes {offset}-\d+/{known.size_bytes}", answer) is not None


def _source_of(url: str, response: addinfourl) -> _Source:
    headers = response.headers
    length = headers.get("Content-Length") or ""
    md5 = re.search(r"\bmd5=([A-Za-z0-9+/]+=*)", ",".join(headers.get_all("x-goog-hash") or []))
    return _Source(
        url=url,
        size_bytes=int(length) if length.isdecimal() else None,
        etag=headers.get("ETag"),
        last_modified=headers.get("Last-Modified"),
        md5=md5[1] if md5 else None,
    )


def _open(url: str, headers: Mapping[str, str]) -> addinfourl:
    """The response to a GET: of status 200, 206, 416 to a Range, or none for a file URL."""
    opener = request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    try:
        response: addinfourl = opener.open(request.Request(url, headers=dict(headers)), timeout=_TIMEOUT_S)  # noqa: S310
    except HTTPError as error:
        if error.code == 416 and "Range" in headers:
            return error
        error.close()
        said = f"HTTP {error.code} {_one_line(error.reason)}"
        if error.code >= 500 or error.code in _BUSY:
            raise _TransientError(said) from None
        raise CheckpointError(f"{url}: {said}: check the address, or name the path of a copy") from None
    except URLError as error:
        if isinstance(error.reason, _HOPELESS):
            raise CheckpointError(f"{url}: {_one_line(error.reason)}: check the address") from None
        raise _TransientError(_one_line(error.reason), unreachable=True) from None
    except (ValueError, InvalidURL) as error:
        raise CheckpointError(f"{url}: not a usable URL: {_one_line(error)}") from None
    except (OSError, HTTPException) as error:
        raise _TransientError(f"no usable answer: {_one_line(error)}") from None
    return response


def _copy(response: addinfourl, part: Path, offset: int, source: _Source) -> None:
    total = source.size_bytes
    size = "of unknown size" if total is None else tqdm.format_sizeof(total, "B")
    _say("%s: downloading, %s, from byte %d", source.url, size, offset)
    bar = tqdm(total=total, initial=offset, desc=part.stem, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
    with bar, part.open("ab") as file:
        while chunk := _read(response):
            file.write(chunk)
            bar.update(len(chunk))
        came = file.tell()
    if total is not None and came != total:
        raise _TransientError(f"{came} of {total} bytes came")


def _read(response: addinfourl) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, HTTPException) as error:  # apart from errors of writing, which another try does not mend
        raise _TransientError(f"the connection broke: {_one_line(error)}") from None


def _say(*line: object) -> None:
    """A line for a log file; a terminal has the bar."""
    log.log(logging.DEBUG if sys.stderr.isatty() else logging.INFO, *line)


def _write(path: Path, content: BaseModel) -> None:
    temporary = Path(f"{path}.tmp")
    temporary.write_text(content.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    Path(f"{part}.json").unlink(missing_ok=True)


def _one_line(error: object) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
