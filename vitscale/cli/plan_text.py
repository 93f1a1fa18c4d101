"""The plan of a run, for a person."""

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

import yaml

GB = 1e9
SAMPLE_BYTES = 100_000
_MARK = {True: ">", False: " "}
_LABEL = 12


def plan_text(plan: Mapping[str, Any]) -> str:
    """All of a plan (`vitscale.cli.plan.draw_plan`) as lines."""
    sections = [
        yaml.safe_dump(plan["config"], sort_keys=False).rstrip().splitlines(),
        _deepspeed(plan),
        [*_model(plan), *_phases(plan), *_reading(plan)],
        _state(plan),
        *(_activations(plan, index) for index in range(len(plan["phases"]))),
        _limits(plan),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _deepspeed(plan: Mapping[str, Any]) -> list[str]:
    if plan["deepspeed"] is None:
        return []
    return ["DeepSpeed config", json.dumps(plan["deepspeed"], indent=2)]


def _labelled(label: str, lines: Sequence[str]) -> list[str]:
    return [(label if index == 0 else "").ljust(_LABEL) + line for index, line in enumerate(lines)]


def _model(plan: Mapping[str, Any]) -> list[str]:
    model = plan["model"]
    shape = (
        f"{model['name']}: {model['depth']} blocks of width {model['embed_dim']}, {model['num_heads']} heads, "
        f"MLP of {model['mlp_hidden']}, {model['num_classes']:,} classes"
    )
    parts = [f"{count:>14,}  {part}" for part, count in model["parts"].items()]
    return _labelled("model", [shape]) + _labelled("parameters", [f"{model['parameters']:,}", *parts])


def _phases(plan: Mapping[str, Any]) -> list[str]:
    lines = []
    for phase in plan["phases"]:
        several = f"until {phase['until']}: " if len(plan["phases"]) > 1 else ""
        height, width = phase["img_size"]
        micro_steps = "1 micro-step" if phase["grad_accum"] == 1 else f"{phase['grad_accum']} micro-steps"
        executed = phase["executed_train_flops"] / phase["train_flops"]
        batch = (
            f"{several}{phase['global_batch']} = {plan['gpus']} ranks x {phase['micro_batch']} images x {micro_steps}"
            f"{_masked(phase['padding'])}, at {height} x {width} px, {phase['tokens']} tokens"
        )
        image = (
            f"an image {phase['forward_flops'] / 1e9:.2f} G forward, {phase['train_flops'] / 1e12:.4f} T training; "
            f"executed {phase['executed_train_flops'] / 1e12:.4f} T ({100 * executed:.1f} %)"
        )
        step = phase["global_batch"] * phase["train_flops"] / 1e15
        lines += _labelled("batch", [batch])
        lines += _labelled("FLOPs", [image, f"a step   {step:.2f} P training, {step / plan['gpus']:.3f} P a GPU"])
    return lines


def _masked(padding: int) -> str:
    return f" - {padding} masked" if padding else ""


def _reading(plan: Mapping[str, Any]) -> list[str]:
    """How shards are read."""
    reading = plan["reading"]
    if reading is None:
        return []
    window_mb = reading["window_samples"] * SAMPLE_BYTES / 2**20
    if not reading["workers_own_lanes"]:
        whose = "workers of a rank" if reading["ranks_own_lanes"] else "ranks"
        told = (
            f"each block in pieces by up to {reading['readers_of_a_block']} {whose}, no byte twice; "
            f"data.lanes={reading['fitting_lanes']} would give each whole lanes (fixed when the run starts)"
        )
        return _labelled("reading", [told])
    ahead = reading["read_ahead_mb"]
    fits = "" if 2 * window_mb <= ahead else f"; data.read_ahead_mb={2 * window_mb:.0f} would hold whole blocks"
    return _labelled(
        "reading",
        [
            f"whole blocks, {reading['lanes_a_rank']} lanes a rank",
            f"at 100 kB a sample {2 * window_mb:.0f} MiB read ahead a rank, data.read_ahead_mb is {ahead}{fits}",
        ],
    )


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """Rows as lines; columns are set to the right but for those of `left`. A row of two cells runs across."""
    full = [row for row in rows if len(row) > 2]
    widths = [max(len(row[index]) for row in full) for index in range(len(full[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        lines.append("  ".join(cells).rstrip() if len(row) > 2 else f"{row[0].ljust(widths[0])}  {row[1]}")
    return lines


def _gb(size: float) -> str:
    return f"{size / GB:.2f}" if size else "-"


def _state(plan: Mapping[str, Any]) -> list[str]:
    columns = ("weights", "master", "moments", "average", "gradients", "buckets", "gathered", "update")
    average = any(row.get("average") for row in plan["state"])
    host = any(row.get("host") for row in plan["state"])
    shown = [column for column in columns if column != "average" or average]
    rows = [["  stage", *shown, "| resident", "peak", *(["on host"] if host else [])]]
    for row in plan["state"]:
        name = f"{_MARK[row['chosen']]} {row['stage']}"
        if "refused" in row:
            rows.append([name, row["refused"]])
            continue
        rows.append([name, *(_gb(row[c]) for c in shown), _gb(row["resident"]), _gb(row["step_bytes"])])
        rows[-1] += [_gb(row["host"])] if host else []
    engine = "engine.kind" if plan["deepspeed"] is None else "ZeRO stage"
    optim = plan["config"]["optim"]["kind"]
    title = f"state, GB a rank on {plan['gpus']} GPUs by {engine} ({optim}, {plan['precision']}; activations apart)"
    return [title, *aligned(rows)]


def _activations(plan: Mapping[str, Any], index: int) -> list[str]:
    phase = plan["phases"][index]
    limited = plan["hbm_gb"] is not None
    several = f" until {phase['until']}" if len(plan["phases"]) > 1 else ""
    head = ["  recompute", "MB an image", "kept", "in backward", "| with state"]
    rows = [head + (["fits", "micro-batch up to", "that divides"] if limited else [])]
    for row in phase["activations"]:
        number = row["every"] or row["budget"]
        name = row["recompute"] + (f" {number:g}" if number else "") + (" (estimate)" if row["estimate"] else "")
        cells = [
            f"{_MARK[row['chosen']]} {name}",
            f"{row['kept_bytes'] / phase['micro_batch'] / 1e6:.1f}",
            *(_gb(row[key]) for key in ("kept_bytes", "backward_bytes", "step_bytes")),
        ]
        if limited:
            largest, dividing = row["largest_micro_batch"], row["largest_dividing"]
            cells += ["yes" if row["fits"] else "NO", str(largest or "none"), str(dividing or "none")]
        rows.append(cells)
    title = f"activations{several}, GB a rank at micro-batch {phase['micro_batch']} ({plan['precision']})"
    if limited:
        title += f"; fits: {plan['hbm_gb']:g} GB less {plan['reserve_gb']:g} GB for CUDA, NCCL and fragmentation"
    return [title, *aligned(rows)]


def _limits(plan: Mapping[str, Any]) -> list[str]:
    lines = [
        "peak: the most that tensors take within a step. in backward: kept, what is recomputed at a time, and what",
        "backward makes. Not known: kernels' workspaces, fragmentation, NCCL's buffers.",
    ]
    if plan["model"]["stem"] is not None:
        lines.append("The ResNet stem's activations are not counted.")
    if plan["config"]["engine"]["kind"] == "torch" and plan["precision"] == "bf16":
        lines.append("Autocast keeps copies that are not counted: more than shown.")
    return lines
