"""What a preflight found, for a person."""

from collections.abc import Iterator, Sequence

from vitscale.cli.plan_text import aligned
from vitscale.train.preflight.choice import Choice, Verdict
from vitscale.train.preflight.reports import Finding, RankReport, Standing, Transfer
from vitscale.train.preflight.rules import Evidence, best_pairs

_STANDINGS = {Standing.SOUND: "ok", Standing.WARNING: "warning", Standing.MEND: "FAULT", Standing.AGAIN: "FAULT"}


def choice_lines(evidence: Evidence, verdicts: Sequence[Verdict], choice: Choice) -> list[str]:
    """A table of the nodes, and a line for each thing that is wrong."""
    best = best_pairs(evidence)
    rows = [("node", "devices", "slowest", "network", "")]
    for verdict in verdicts:
        report, ranks = evidence.reports.get(verdict.node), evidence.of(verdict.node)
        devices = report.facts.get("gpus", "CPU") if report is not None else "-"
        rows.append((verdict.node, devices, _slowest(ranks), _rate(best.get(verdict.node)), _fate(verdict, choice)))
    lines = aligned(rows, left=(0, 1, 4))
    for verdict in verdicts:
        lines += [f"{verdict.node}: {fault}" for fault in verdict.faults]
        lines += [f"{verdict.node}: {line}" for line in verdict.slow]
        lines += [f"{verdict.node}: warning: {line}" for line in verdict.warnings]
    transfers = next((rank.transfers for rank in evidence.ranks if rank.transfers), ())
    if transfers:
        lines += [f"bus bandwidth among all ranks: {', '.join(_transfers(transfers))}"]
    elif len(choice.used) * evidence.tasks_per_node > 1:  # rank 0's node broke down, and the others have no way to meet
        lines += ["warning: the network among all ranks was not checked: no rank came to the end of that check"]
    return lines


def finding_lines(findings: Sequence[Finding], ranks: Sequence[RankReport]) -> list[str]:
    """One machine's checks and devices."""
    rows = [(finding.check, _STANDINGS[finding.standing], finding.said) for finding in findings]
    rows += [(rank.device, "FAULT" if rank.fault else "ok", rank.fault or _slowest([rank])) for rank in ranks]
    return aligned(rows, left=(0, 1, 2))


def _fate(verdict: Verdict, choice: Choice) -> str:
    if verdict.node in choice.used:
        return "used, though slow" if verdict.slow else "used"
    if verdict.faults:
        return "left out"
    return "left out, slow" if verdict.slow else "spare" if choice.used else "sound"


def _slowest(ranks: Sequence[RankReport]) -> str:
    rates = [rank.flops_per_s for rank in ranks if rank.flops_per_s is not None]
    return f"{min(rates) / 1e12:.3g} TFLOP/s" if rates else "-"


def _rate(bytes_per_s: float | None) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s" if bytes_per_s is not None else "-"


def _transfers(transfers: Sequence[Transfer]) -> Iterator[str]:
    for transfer in transfers:
        size = (
            f"{transfer.size_bytes >> 20} MiB" if transfer.size_bytes >= 1 << 20 else f"{transfer.size_bytes >> 10} KiB"
        )
        yield f"{transfer.collective} of {size} {_rate(transfer.bus_bytes_per_s)}"
