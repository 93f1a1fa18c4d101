"""What the collectives of a step carry at each ZeRO stage, counted on a small ViT."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitscale.bench.small_engine import small_engine
from vitscale.engine import Precision, Traffic, record_communication
from vitscale.ranks.groups import Ranks


@dataclass(frozen=True)
class CommunicationRow:
    """One rank's collectives in one optimizer step."""

    zero_stage: int
    grad_accum: int
    precision: Precision
    world_size: int
    depth: int
    parameters: int
    by_kind: dict[str, Traffic]

    @property
    def payload_bytes_a_parameter(self) -> float:
        """Bytes of the tensors that collectives worked on, over the model's parameters."""
        return sum(traffic.payload_bytes for traffic in self.by_kind.values()) / self.parameters

    @property
    def wire_bytes_a_parameter(self) -> float:
        """Bytes that the rank sent in rings, over the model's parameters."""
        return sum(traffic.wire_bytes for traffic in self.by_kind.values()) / self.parameters

    @property
    def gathers(self) -> int:
        """All-gathers in the step."""
        return self.by_kind["all_gather"].calls if "all_gather" in self.by_kind else 0


def measure(
    ranks: Ranks,
    *,
    precision: Precision = "bf16",
    zero_stages: Sequence[int] = (1, 2, 3),
    grad_accums: Sequence[int] = (1, 3),
    depth: int = 6,
    warmup_steps: int = 2,
) -> list[CommunicationRow]:
    """Count the collectives of one step at each stage and accumulation. Collective.

    Args:
        ranks: a started process group.
        precision: of weights and gradients.
        zero_stages: to be counted.
        grad_accums: micro-steps of a step, to be counted at each stage.
        depth: blocks of the model.
        warmup_steps: that go before; at stage 3 the first records what is gathered when.
    """
    rows = []
    for stage in zero_stages:
        for grad_accum in grad_accums:
            engine, micro_batches, parameters = small_engine(
                ranks, depth=depth, grad_accum=grad_accum, zero_stage=stage, precision=precision
            )
            for _ in range(warmup_steps):
                engine.train_step(micro_batches, 1e-4)
            with record_communication() as record:
                engine.train_step(micro_batches, 1e-4)
            rows.append(
                CommunicationRow(stage, grad_accum, precision, ranks.world_size, depth, parameters, record.by_kind)
            )
    return rows
