"""The cluster that the tests of this folder share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, up for the whole session; the tests that use it are skipped where there can be none."""
    if lack := missing():
        pytest.skip(f"no Slurm cluster here: {lack}")
    root = Path(tempfile.mkdtemp(prefix="vs-slurm-"))
    cluster = Cluster(root, nodes=2)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root)
