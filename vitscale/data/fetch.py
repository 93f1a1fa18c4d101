"""Reads samples' bytes out of their shards, by the offsets of the index."""

import os
import zlib
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from vitscale.data.decode import BadSample
from vitscale.data.index import SplitIndex
from vitscale.errors import ShardError

MAX_OPEN_SHARDS = 64


class SampleReader:
    """Reads the samples of one split; keeps the shards it used last open."""

    def __init__(self, index: SplitIndex) -> None:
        """Open nothing yet: each loader process opens its own files."""
        self.index = index
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def reading_order(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `rows`, by shard and then offset, so that a batch is read forwards."""
        return np.lexsort((self.index.offset[rows], self.index.shard[rows]))

    def read(self, row: int) -> bytes:
        """The bytes of one sample.

        Raises:
            BadSample: the bytes are not those that were indexed.
            ShardError: the shard cannot be read.
        """
        index = self.index
        try:
            data = os.pread(self._descriptor(int(index.shard[row])), int(index.size[row]), int(index.offset[row]))
        except OSError as error:
            raise ShardError(
                f"{index.shard_path(row)}: sample {index.key(row)} cannot be read ({error.strerror}): "
                "put the shard back or check the disk, then start again"
            ) from None
        if zlib.crc32(data) != index.crc32[row]:
            raise BadSample("its crc32 is not the one in the index")
        return data

    def close(self) -> None:
        """Close the shards."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) == MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self.index.root / self.index.shards[shard], os.O_RDONLY)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]
