"""How the training order's lanes fall on ranks and their workers, and what is read ahead for them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Who reads what: lanes that belong whole to a rank, and to one worker of it."""

    lanes: int
    block: int
    world_size: int
    workers: int

    @property
    def ranks_own_lanes(self) -> bool:
        """Whether each lane belongs to one rank, which then reads every block of it whole."""
        return self.lanes % (2 * self.world_size) == 0

    @property
    def workers_own_lanes(self) -> bool:
        """Whether each lane of a rank belongs to one of its workers as well."""
        return self.lanes % (2 * self.world_size * max(1, self.workers)) == 0

    @property
    def window_samples(self) -> int:
        """Samples that a rank reads at a time to read whole blocks; twice as many are in memory at most."""
        return self.lanes * self.block // self.world_size

    @property
    def readers_of_a_block(self) -> int:
        """Processes that a block is read by in pieces, no byte twice; 1 where it is read whole."""
        pairs = math.ceil(self.lanes / 2)  # a lane's next position lies this many pairs further
        parts = self.world_size * max(1, self.workers)
        return min(self.block, parts // math.gcd(parts, pairs))

    @property
    def fitting_lanes(self) -> int:
        """The least number of lanes, from the present one on, that gives every worker whole lanes."""
        unit = 2 * self.world_size * max(1, self.workers)
        return math.ceil(self.lanes / unit) * unit
