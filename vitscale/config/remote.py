"""How shards behind a URL are read: the `data.remote` section."""

from pathlib import Path

from vitscale.config.section import AboveZero, Section


class RemoteSection(Section):
    """Timeouts, retries and the node's cache for shards behind a URL; shards in a folder need none of it.

    Credentials, endpoint and region of an object store come from its usual environment variables (AWS_*, GOOGLE_*,
    AZURE_*); `AWS_SKIP_SIGNATURE=true` reads a public bucket.
    """

    connect_timeout_s: AboveZero = 10.0
    """Longest wait for a connection."""
    stall_timeout_s: AboveZero = 30.0
    """Longest silence of the server within one request."""
    request_timeout_s: AboveZero = 120.0
    """Longest duration of one request, so that a server which answers byte by byte is left."""
    patience_s: AboveZero = 300.0
    """How long one read is tried again, with growing random pauses, before the run ends as worth a requeue."""
    longest_pause_s: AboveZero = 30.0
    """Longest pause between two tries."""
    cache_folder: Path | None = None
    """Folder on the node's own disk that keeps whole shards, for all processes of the node; null keeps none.

    In every epoch a node reads other parts of all shards, so it pays where a run has more epochs than nodes.
    """
    cache_limit_gb: AboveZero = 500.0
    """Size up to which the cache folder grows, in units of 10^9 bytes."""
