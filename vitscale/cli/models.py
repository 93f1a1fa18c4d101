"""`vitscale models`."""

from typing import Literal

import click

from vitscale.config import BatchSplit, EngineSection
from vitscale.engine import render_deepspeed_config
from vitscale.model import TABLE, Entry, Recompute, forward_flops, resolve_variant, train_flops
from vitscale.planning import ActivationRule, activation_bytes, parameter_parts, state_bytes

_COLUMNS = ("name", "px", "patch", "width", "depth", "heads", "hidden", "repr.", "classes", "parameters", "GFLOPs",
            "weights")  # fmt: skip
_RANKS = (1, 8, 64)
_RECOMPUTE: tuple[Recompute, ...] = ("none", "full")
_STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


@click.command(name="models", short_help="List the variants.")
@click.option("--detail", metavar="NAME", help="All about one variant: parameters by part, FLOPs, memory.")
@click.option("--markdown", is_flag=True, help="The list as docs/models.md has it.")
def command(detail: str | None, markdown: bool) -> None:
    """List the model variants: shape, parameters, forward FLOPs of one image, and whether weights are published.

    \b
    Examples:
      vitscale models
      vitscale models --detail vit_huge_patch14_224_in21k
    """
    if detail is not None:
        click.echo("\n".join(_describe(detail)))
    elif markdown:
        click.echo("\n".join(markdown_table()))
    else:
        rows = [_COLUMNS, *(_row(name, entry) for name, entry in TABLE.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            click.echo("  ".join([row[0].ljust(widths[0]), *numbers]))


def markdown_table() -> list[str]:
    """The table of variants as Markdown lines, each row with its paper and its name in timm."""
    lines = [
        f"| {' | '.join(_COLUMNS)} | in timm | shape from |",
        f"|---|{'--:|' * (len(_COLUMNS) - 1)}---|---|",
    ]
    for name, entry in TABLE.items():
        lines.append(f"| {' | '.join(_row(name, entry))} | {entry.timm_name or ''} | {entry.source} |")
    return lines


def _row(name: str, entry: Entry) -> tuple[str, ...]:
    variant = entry.variant
    return (
        name,
        _sides(variant.image_px),
        ("" if variant.stem is None else f"R{list(variant.stem)}+") + _sides(variant.patch_kernel),
        str(variant.embed_dim),
        str(variant.depth),
        str(variant.num_heads),
        str(variant.mlp_hidden),
        str(variant.representation_size or ""),
        str(variant.num_classes),
        f"{sum(parameter_parts(variant).values()):,}",
        f"{forward_flops(variant) / 1e9:.2f}",
        "yes" if entry.weights_url else "",
    )


def _state_gb(parameters: int, stage: Literal[1, 2, 3], ranks: int) -> float:
    rendered = render_deepspeed_config(EngineSection(zero_stage=stage), BatchSplit(2 * ranks, 2, 1, ranks), 1.0, "bf16")
    zero = rendered["zero_optimization"] | {"stage3_param_persistence_threshold": 0}  # nothing is known of its tensors
    return state_bytes([[parameters]], world_size=ranks, zero=zero, precision="bf16").total / 1e9


def _sides(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _describe(name: str) -> list[str]:
    variant = resolve_variant(name)
    entry = TABLE[name]
    pixels = entry.preprocessing
    parts = parameter_parts(variant)
    total = sum(parts.values())
    rows, columns = variant.grid
    options = {
        "pool": variant.pool, "act": variant.act, "distilled": variant.distilled, "qkv_bias": variant.qkv_bias,
        "qk_norm": variant.qk_norm, "parallel": variant.parallel, "norm_bias": variant.norm_bias,
    }  # fmt: skip
    facts = {
        "shape from": entry.source,
        "weights": entry.weights_url or "none published",
        "in timm": entry.timm_name or "not there",
        "input": f"{variant.in_chans} x {' x '.join(map(str, variant.image_px))} px, mean {list(pixels.mean)}, "
        f"std {list(pixels.std)}, crop {pixels.crop}, {pixels.interpolation}",
        "tokens": f"{variant.tokens} = {rows} x {columns} patches of {_sides(variant.patch_px)} px "
        f"+ {variant.prefix_tokens} before them",
        "trunk": f"{variant.depth} blocks of width {variant.embed_dim}, {variant.num_heads} heads of "
        f"{variant.head_dim}, MLP of {variant.mlp_hidden}",
        "options": ", ".join(f"{key}={value}" for key, value in options.items()),
    }
    lines = [name, *(f"  {what:13}{fact}" for what, fact in facts.items()), ""]
    lines += [f"  {part:22}{count:>16,}" for part, count in {**parts, "parameters": total}.items()]
    forward, training = forward_flops(variant) / 1e9, train_flops(variant) / 1e12
    lines += [
        "",
        f"  FLOPs, an image       {forward:.2f} G forward, {training:.4f} T training",
        f"  weights               {total * 4 / 1e9:.2f} GB fp32, {total * 2 / 1e9:.2f} GB bf16",
    ]
    for stage in _STAGES:
        shown = ", ".join(f"{_state_gb(total, stage, ranks):.1f} on {ranks}" for ranks in _RANKS)
        lines.append(f"  ZeRO {stage} state, a rank   {shown} GPUs (GB, bf16, AdamW)")
    kept, full = (
        activation_bytes(variant, 1, ActivationRule(recompute=recompute)).blocks / 1e6 for recompute in _RECOMPUTE
    )
    lines.append(f"  activations, an image {kept:.0f} MB; {full:.0f} MB under full checkpointing (bf16)")
    return lines
