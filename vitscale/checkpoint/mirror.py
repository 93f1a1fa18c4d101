"""A copy of a run's checkpoints in an object store, for the day the disk they are on is gone.

    URL/NAME/step-00001000/rank-00000.safetensors
                           manifest.json          last to be written and first to be removed

NAME is the run directory's. A tag without a manifest does not exist, as on the disk. The client is an extra that most
runs do without, so it is imported where a mirror is named.
"""

import contextlib
import errno
import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from vitscale.checkpoint.integrity import check_file, counter, fsync
from vitscale.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, parse_manifest, read_manifest
from vitscale.checkpoint.store import CheckpointStore
from vitscale.checkpoint.tags import is_tag, step_of, tag_of
from vitscale.config import RemoteSection
from vitscale.errors import CheckpointError, ConfigError, ExitStatus

log = logging.getLogger(__name__)

_PART_BYTES = 8 << 20
_READ_BYTES = 64 << 20  # of one request, which must be over within RemoteSection.request_timeout_s
_MAX_PARTS = 9_000  # object stores take 10,000
_FILES_AT_ONCE, _PARTS_AT_ONCE = 4, 16
_LONGEST_PAUSE_S = 20.0


class Mirror:
    """The checkpoints of one run in an object store. One thread at a time may use it."""

    def __init__(self, url: str, patience_s: float = 180.0) -> None:
        """Connect to nothing yet.

        Args:
            url: of the run's folder.
            patience_s: how long one request is tried again.

        Raises:
            ConfigError: the client is not installed.
        """
        self.url = url.rstrip("/")
        self._patience_s = patience_s
        self._client = _client(url)
        self._obstore = self._client.obstore
        self._manifests: dict[str, tuple[str, Manifest]] = {}
        self._uploaded: set[tuple[str, FileRecord]] = set()

    def tags(self) -> list[str]:
        """Names of the tags there, sound or not, the oldest first.

        Raises:
            CheckpointError: the object store does not answer, or refuses.
        """
        return _finished(self._listing())

    def unfinished(self) -> list[str]:
        """Names of the tags that cut-off uploads and removals left; raises as `tags` does."""
        listing = self._listing()
        return sorted(listing.keys() - set(_finished(listing)))

    def manifest(self, tag: str) -> Manifest:
        """The manifest of a tag, whose files are not looked at.

        Raises:
            CheckpointError: it is missing or damaged, or the object store does not give it.
        """
        path = f"{tag}/{MANIFEST_NAME}"
        with self._asking(path):
            answer = self._obstore.get(self._store, path)
            version = str(answer.meta["e_tag"] or answer.meta["last_modified"])
            if tag in self._manifests and self._manifests[tag][0] == version:
                return self._manifests[tag][1]
            text = bytes(answer.bytes())
        manifest = parse_manifest(text, f"{self.url}/{path}")
        if tag_of(manifest.step) != tag:
            raise CheckpointError(f"{self.url}/{tag}: holds the checkpoint of step {manifest.step}: remove it there")
        self._manifests[tag] = version, manifest
        return manifest

    def manifests(self) -> tuple[dict[str, Manifest], dict[str, str]]:
        """Every tag's manifest, or a line that says why it has none that can be read; raises as `tags` does."""
        found: dict[str, Manifest] = {}
        faults: dict[str, str] = {}
        for tag in self.tags():
            try:
                found[tag] = self.manifest(tag)
            except MirrorError:
                raise
            except CheckpointError as error:
                faults[tag] = str(error)
        return found, faults

    def incomplete(self, manifests: Mapping[str, Manifest]) -> list[str]:
        """The tags among these that miss a file there, or have one of another size; raises as `tags` does."""
        listing = self._listing()
        return [
            tag
            for tag, manifest in manifests.items()
            if any(listing.get(tag, {}).get(record.name) != record.size_bytes for record in manifest.files)
        ]

    def faults(self, tag: str) -> list[str]:
        """What is wrong with a tag, down to the last byte, in a line for the first thing; raises as `tags` does."""
        try:
            self._read_files(tag, self.manifest(tag).files, into=None)
        except MirrorError:
            raise
        except CheckpointError as error:
            return [str(error)]
        return []

    def upload(self, directory: Path) -> None:
        """Copy a tag's directory, the manifest last. Files that an earlier try brought there are not sent again.

        Raises:
            CheckpointError: the object store does not take it.
            OSError: a file cannot be read, or the mirror is a folder that cannot be made.
        """
        tag, manifest = directory.name, read_manifest(directory)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        there = self._listing(tag).get(tag, {})
        if MANIFEST_NAME in there:  # of another start: what is written over is no checkpoint until it is whole
            self._delete(tag, [MANIFEST_NAME])

        def send(record: FileRecord) -> None:
            if (tag, record) in self._uploaded and there.get(record.name) == record.size_bytes:
                return
            self._put(f"{tag}/{record.name}", directory / record.name, record.size_bytes)
            self._uploaded.add((tag, record))

        # One after the other, each in many parts: the interpreter would wait at its end for a pool's whole queue.
        for record in manifest.files:
            send(record)
        self._put(f"{tag}/{MANIFEST_NAME}", (directory / MANIFEST_NAME).read_bytes(), 0)
        self._uploaded = {entry for entry in self._uploaded if entry[0] != tag}

    def fetch(self, tag: str, into: CheckpointStore) -> Manifest:
        """Bring a tag to the disk: into a temporary directory, compared with the manifest, and then committed.

        Files that an earlier try brought are not asked for again.

        Raises:
            CheckpointError: the object store does not give it, or it is damaged there.
            OSError: the disk does not take it.
        """
        manifest = self.manifest(tag)
        staging = into.staging(manifest.step, manifest.generation)
        names = {record.name for record in manifest.files}
        for entry in staging.iterdir():
            if entry.name not in names:
                entry.unlink()
        self._read_files(tag, manifest.files, staging)
        into.commit(staging, manifest)
        return manifest

    def remove(self, tag: str) -> None:
        """Take a tag away, or what a cut-off upload left of one.

        Raises:
            CheckpointError: the object store does not do it.
        """
        self._delete(tag, self._listing(tag).get(tag, {}))

    def _read_files(self, tag: str, records: list[FileRecord], into: Path | None) -> None:
        total = sum(record.size_bytes for record in records)
        log.info("%s/%s: reading %d files, %s", self.url, tag, len(records), tqdm.format_sizeof(total, "B"))
        bar = tqdm(total=total, desc=f"reading {tag}", unit="B", unit_scale=True, leave=False, disable=None)
        with bar, ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            seen = counter(bar)
            list(pool.map(lambda record: self._read_file(tag, record, into, seen), records))

    def _read_file(self, tag: str, record: FileRecord, into: Path | None, seen: Callable[[int], None]) -> None:
        path, target = f"{tag}/{record.name}", Path(os.devnull) if into is None else into / record.name
        if into is not None:
            with contextlib.suppress(CheckpointError):
                check_file(target, record)
                seen(record.size_bytes)
                return
        digest, size = hashlib.sha256(), 0
        with target.open("wb") as file:
            for chunk in self._stream(path, record.size_bytes):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                seen(len(chunk))
        if (size, digest.hexdigest()) != (record.size_bytes, record.sha256):
            raise CheckpointError(
                f"{self.url}/{path}: {size} bytes of another content than the {record.size_bytes} that were written"
            )
        if into is not None:
            fsync(target)

    def _stream(self, path: str, size_bytes: int) -> Iterator[memoryview]:
        """A file in parts, each by a request of its own: one request for a large file would outlast its time."""
        with self._asking(path):
            size = self._obstore.head(self._store, path)["size"]
        if size != size_bytes:
            raise CheckpointError(f"{self.url}/{path}: {size} bytes where {size_bytes} were written")
        for start in range(0, size_bytes, _READ_BYTES):
            length = min(_READ_BYTES, size_bytes - start)
            with self._asking(path):
                part = self._obstore.get_range(self._store, path, start=start, length=length)
            yield memoryview(part)

    def _listing(self, tag: str | None = None) -> dict[str, dict[str, int]]:
        """Tag -> name of a file -> its size in bytes."""
        found: dict[str, dict[str, int]] = {}
        with self._asking(tag or "", missing_is_empty=True):
            for chunk in self._obstore.list(self._store, tag, chunk_size=1000):
                for entry in chunk:
                    folder, _, name = entry["path"].rpartition("/")
                    if is_tag(folder):
                        found.setdefault(folder, {})[name] = entry["size"]
        return found

    def _put(self, path: str, content: Path | bytes, size_bytes: int) -> None:
        part_bytes = max(_PART_BYTES, -(-size_bytes // _MAX_PARTS))
        with self._asking(path):
            self._obstore.put(self._store, path, content, chunk_size=part_bytes, max_concurrency=_PARTS_AT_ONCE)

    def _delete(self, tag: str, names: Collection[str]) -> None:
        first = [name for name in names if name == MANIFEST_NAME]
        for group in (first, [name for name in names if name != MANIFEST_NAME]):
            if group:
                with self._asking(tag, missing_is_empty=True):
                    self._obstore.delete(self._store, [f"{tag}/{name}" for name in group])

    @property
    def _folder(self) -> Path | None:
        """Of a mirror on a disk; it is made by the first upload, not by a look."""
        return Path(unquote(urlsplit(self.url).path)) if self.url.startswith("file:///") else None

    @cached_property
    def _store(self) -> Any:
        remote, options = RemoteSection(), dict[str, Any]()
        if self._folder is None:
            options["client_options"] = {
                "allow_http": True,  # for an endpoint of one's own
                "connect_timeout": timedelta(seconds=remote.connect_timeout_s),
                "read_timeout": timedelta(seconds=remote.stall_timeout_s),
                "timeout": timedelta(seconds=remote.request_timeout_s),
            }
            options["retry_config"] = {
                "max_retries": 1_000,  # the time is the limit
                "retry_timeout": timedelta(seconds=self._patience_s),
                "backoff": {"max_backoff": timedelta(seconds=_LONGEST_PAUSE_S)},
            }
        elif self._folder.is_dir():
            options["automatic_cleanup"] = True
        elif os.path.lexists(self._folder):  # a link to a disk that is not mounted is no mirror without tags
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        else:
            raise FileNotFoundError(self._folder)
        try:
            return self._client.from_url(self.url, **options)
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            raise self._refusal(self.url, error, may_pass=False) from None

    @contextlib.contextmanager
    def _asking(self, path: str, missing_is_empty: bool = False) -> Iterator[None]:
        """Have the client's errors end in one line."""
        try:
            yield
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and missing_is_empty:
                return
            where = f"{self.url}/{path}".rstrip("/")
            if isinstance(error, FileNotFoundError):
                raise CheckpointError(f"{where}: missing") from None
            raise self._refusal(where, error, may_pass=self._client.may_pass(error)) from None

    def _refusal(self, where: str, error: Exception, *, may_pass: bool) -> "MirrorError":
        return MirrorError(
            f"{where}: {self._client.cause(error)}: check the URL, the network and the object store's variables "
            "in the environment (AWS_*, GOOGLE_*, AZURE_*)",
            may_pass,
        )


class MirrorError(CheckpointError):
    """The object store did not answer or refused: nothing says that a checkpoint is bad."""

    def __init__(self, message: str, may_pass: bool = True) -> None:
        """Worth another start where what failed may pass, and else a person's to mend."""
        super().__init__(message)
        self.status = ExitStatus.TRANSIENT if may_pass else ExitStatus.USER_ERROR


def _finished(listing: Mapping[str, dict[str, int]]) -> list[str]:
    return sorted((tag for tag, names in listing.items() if MANIFEST_NAME in names), key=step_of)


def _client(url: str) -> Any:
    try:
        return importlib.import_module("vitscale.data.remote")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{url}: a mirror of checkpoints needs {error.name}, which is not installed: pip install 'vitscale[remote]'"
        ) from None
