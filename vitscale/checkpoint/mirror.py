"""A copy of a run's checkpoints in an object store, for the day the disk they are on is gone.

    URL/NAME/step-00001000/rank-00000.safetensors
                           manifest.json          last to be written and first to be removed

NAME is the run directory's. A tag without a manifest does not exist, as on the disk. The client is an extra that most
runs do without, so it is imported where a mirror is named.
"""

import contextlib
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

from tqdm import tqdm

from vitscale.checkpoint.integrity import check_file, counter, fsync
from vitscale.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, parse_manifest, read_manifest
from vitscale.checkpoint.store import CheckpointStore, is_tag, step_of, tag_of
from vitscale.config import RemoteSection
from vitscale.errors import CheckpointError, ConfigError, ExitStatus

log = logging.getLogger(__name__)

_PART_BYTES = 8 << 20
_MAX_PARTS = 9_000  # object stores take 10,000
_FILES_AT_ONCE, _PARTS_AT_ONCE = 4, 4
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
            OSError: a file cannot be read.
        """
        tag, manifest = directory.name, read_manifest(directory)
        there = self._listing(tag).get(tag, {})
        if MANIFEST_NAME in there:  # of another start: what is written over is no checkpoint until it is whole
            self._delete(tag, [MANIFEST_NAME])

        def send(record: FileRecord) -> None:
            if (tag, record) in self._uploaded and there.get(record.name) == record.size_bytes:
                return
            self._put(f"{tag}/{record.name}", directory / record.name, record.size_bytes)
            self._uploaded.add((tag, record))

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            list(pool.map(send, manifest.files))
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
            for chunk in self._stream(path):
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

    def _stream(self, path: str) -> Iterator[memoryview]:
        with self._asking(path):
            chunks = iter(self._obstore.get(self._store, path).stream(min_chunk_size=_PART_BYTES))
        while True:
            with self._asking(path):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield memoryview(chunk)

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
            self._obstore.put(
                self._store, path, content, chunk_size=part_bytes, max_concurrency=_PARTS_AT_ONCE
            )  # fmt: skip

    def _delete(self, tag: str, names: Collection[str]) -> None:
        first = [name for name in names if name == MANIFEST_NAME]
        for group in (first, [name for name in names if name != MANIFEST_NAME]):
            if group:
                with self._asking(tag, missing_is_empty=True):
                    self._obstore.delete(self._store, [f"{tag}/{name}" for name in group])

    @cached_property
    def _store(self) -> Any:
        if self.url.startswith("file://"):
            return self._client.from_url(self.url, automatic_cleanup=True, mkdir=True)
        remote = RemoteSection()
        return self._client.from_url(
            self.url,
            client_options={
                "allow_http": True,  # for an endpoint of one's own
                "connect_timeout": timedelta(seconds=remote.connect_timeout_s),
                "read_timeout": timedelta(seconds=remote.stall_timeout_s),
                "timeout": timedelta(seconds=remote.request_timeout_s),
            },
            retry_config={
                "max_retries": 1_000,  # the time is the limit
                "retry_timeout": timedelta(seconds=self._patience_s),
                "backoff": {"max_backoff": timedelta(seconds=_LONGEST_PAUSE_S)},
            },
        )

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
            raise MirrorError(
                f"{where}: {self._client.cause(error)}: check the URL, the network and the object store's variables "
                "in the environment (AWS_*, GOOGLE_*, AZURE_*)"
            ) from None


class MirrorError(CheckpointError):
    """The object store did not answer or refused: worth another start, for nothing says that a checkpoint is bad."""

    status = ExitStatus.TRANSIENT


def _finished(listing: Mapping[str, dict[str, int]]) -> list[str]:
    return sorted((tag for tag, names in listing.items() if MANIFEST_NAME in names), key=step_of)


def _client(url: str) -> Any:
    try:
        return importlib.import_module("vitscale.data.remote")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{url}: a mirror of checkpoints needs {error.name}, which is not installed: pip install 'vitscale[remote]'"
        ) from None
