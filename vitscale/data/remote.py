"""Reads shards behind a URL through obstore: HTTP servers, S3 and what speaks like it, Google Cloud Storage, Azure.

The client makes the requests and keeps their timeouts; which answers are worth another try is decided here.
"""

import logging
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import HTTPStore, ObjectStore, from_url
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_before_delay,
    stop_when_event_set,
    wait_random_exponential,
)

from vitscale.config.remote import RemoteSection
from vitscale.data.shard_bytes import ShardStat, ShardUnreachableError, Transfers, checked_name
from vitscale.errors import ShardError

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
# One failure is a server's daily life; this many in a row of one read are worth a line in the log.
FAILURES_UNTIL_TOLD = 3
# The server found the request too slow, too early, or one too many.
PASSING_STATUSES = (408, 425, 429)
# Where cloud machines ask for credentials once the environment has none.
METADATA_ADDRESS = "169.254.169.254"

T = TypeVar("T")


class RemoteShards:
    """Shards below a URL. Reads wait for the network without the interpreter lock, so threads read side by side."""

    def __init__(self, location: str, remote: RemoteSection) -> None:
        """Connect to nothing yet.

        Raises:
            ShardError: the URL holds a password.
        """
        url = urlsplit(location)
        # What stands behind the question mark may be a signature, which is nothing for logs.
        self.location = f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"
        self.transfers = Transfers()
        self._url = location.rstrip("/")
        self._remote = remote
        self._closed = threading.Event()
        if "@" in url.netloc:
            raise ShardError(
                f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}: a user or password in a URL is not sent: "
                "take it out, and serve the shards without one or from an object store"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections stay in their process."""
        return RemoteShards, (self._url, self._remote)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of a shard, from `offset` on; raises ShardError, or ShardUnreachableError."""

        def request() -> bytes:
            data = bytes(obstore.get_range(self._store, shard, start=offset, length=size))
            if len(data) == size:
                return data
            # A range that reaches beyond the end of the shard is answered with what there is.
            ends_early = obstore.head(self._store, shard)["size"] < offset + size
            message = f"{len(data)} bytes came, {size} were asked for"
            raise _TooShortError(message) if ends_early else _ShortAnswerError(message)

        if size == 0:
            return b""
        data = self._patiently(shard, request)
        self.transfers.read_bytes += size
        return data

    def stat(self, shard: str) -> ShardStat:
        """Size and version of a shard; raises as `read` does."""
        found = self._patiently(shard, lambda: obstore.head(self._store, shard))
        return ShardStat(found["size"], found["e_tag"] or found["last_modified"].isoformat())

    def close(self) -> None:
        """End the reads that wait for another try; nothing is read after it."""
        self._closed.set()

    @cached_property
    def _store(self) -> ObjectStore:
        remote = self._remote
        options: Any = {
            "allow_http": not self._url.startswith("https://"),
            "connect_timeout": timedelta(seconds=remote.connect_timeout_s),
            "read_timeout": timedelta(seconds=remote.stall_timeout_s),
            "timeout": timedelta(seconds=remote.request_timeout_s),
        }
        try:
            if self._url.startswith("http"):
                return HTTPStore(self._url, client_options=options, retry_config={"max_retries": 0})
            return from_url(self._url, client_options=options, retry_config={"max_retries": 0})
        except (BaseError, ValueError) as error:
            raise ShardError(
                f"{self.location}: cannot be opened ({cause(error)}): check the URL and the object store's variables "
                "in the environment"
            ) from None

    def _patiently(self, shard: str, request: Callable[[], T]) -> T:
        checked_name(self.location, shard)
        remote = self._remote
        retrying = Retrying(
            retry=retry_if_exception(may_pass),
            wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=remote.longest_pause_s),
            stop=stop_before_delay(remote.patience_s) | stop_when_event_set(self._closed),
            sleep=sleep_using_event(self._closed),
            before=self._count_request,
            before_sleep=lambda state: self._count_retry(shard, state),
            reraise=True,
        )
        try:
            return retrying(request)
        except (BaseError, OSError, ValueError, _ShortAnswerError, _TooShortError) as error:
            if not may_pass(error):
                raise ShardError(f"{self.location}/{shard}: {cause(error)}: {_mend(error)}") from None
            tries = retrying.statistics["attempt_number"]
            raise ShardUnreachableError(
                f"{self.location}/{shard}: no answer ({cause(error)}; tries: {tries}): {_mend(error)}"
            ) from None

    def _count_request(self, state: RetryCallState) -> None:
        self.transfers.requests += 1

    def _count_retry(self, shard: str, state: RetryCallState) -> None:
        self.transfers.retries += 1
        if state.attempt_number == FAILURES_UNTIL_TOLD:
            error = state.outcome.exception() if state.outcome else None
            log.warning(
                "%s/%s: failed %d times, and is tried for up to %g s: %s",
                self.location,
                shard,
                state.attempt_number,
                self._remote.patience_s,
                f"{cause(error)}: {_mend(error)}" if error else "",
            )


class _ShortAnswerError(Exception):
    """The body ended in good order, but too early."""


class _TooShortError(Exception):
    """The shard ends before the range does."""


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, _ShortAnswerError):
        return True
    # The client has classes for what cannot pass (missing, forbidden, no ranges); the rest is one class.
    if type(error) is not obstore.exceptions.GenericError or _is_too_short(error):
        return False
    status = _status(error)
    return status is None or status >= 500 or status in PASSING_STATUSES


def _status(error: BaseException) -> int | None:
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def _is_too_short(error: BaseException) -> bool:
    """Whether the server answered with less than the range, because its file ends there."""
    return isinstance(error, _TooShortError) or _status(error) == 416


def cause(error: BaseException) -> str:
    """The client's sentence, and the innermost of the values that it prints below: what the network said."""
    sentence, _, trace = str(error).partition("\n")
    # "Error performing GET http://... in 1.2ms - ": the URL is told already.
    said = re.sub(r"^.* in [\d.]+[nµm]?s - ", "", sentence).strip().rstrip(":")
    values = re.findall(r'message: "([^"]*)"|(?:kind|source): ([A-Z]\w+),$|^ +([A-Z]\w+),$', trace, re.MULTILINE)
    return f"{said} ({''.join(values[-1])})" if values else said


def _mend(error: BaseException) -> str:
    """What the reader of an error can do about it."""
    if isinstance(error, FileNotFoundError):
        return "put the shard there, or name the place where it is"
    if METADATA_ADDRESS in str(error):
        return "no credentials in the environment: set AWS_* or GOOGLE_*, or AWS_SKIP_SIGNATURE=true (a public bucket)"
    if isinstance(error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError):
        return "check the credentials in the environment (AWS_*, GOOGLE_*, AZURE_*)"
    if isinstance(error, obstore.exceptions.NotSupportedError):
        return "serve the shards by a server that answers range requests, as nginx does"
    if _is_too_short(error):
        return "the shard is shorter than the index says: copy it there again"
    return "check the server and the network, then start again"
