"""The cluster that the tests of this folder share."""

from collections.abc import Iterator

import pytest
from cluster import Cluster, started_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, up for the whole session; the tests that use it are skipped where there can be none."""
    with started_cluster(nodes=2) as cluster:
        yield cluster
