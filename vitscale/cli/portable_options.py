"""What the commands that write portable models have in common: options, and the report at the end."""

import difflib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ValidationError

from vitscale.checkpoint import CERTIFICATE_NAME, FORMATS, READERS, Certificate, ExportOptions, Hints
from vitscale.config import ModelSection
from vitscale.errors import CheckpointError
from vitscale.model import VARIANTS, Size, Variant
from vitscale.telemetry import peak_rss_bytes

Command = Callable[..., Any]
_FIELDS = [field.name for field in fields(Variant)]
_RESAMPLINGS = click.Choice(["timm", "timm_npz", "google"])


class _ImageSize(click.ParamType[Size]):
    """224 or 224x448."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        """Pixels: the side of a square, or (height, width)."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        sides = [int(side) for side in value.split("x") if side.isdecimal() and int(side) > 0]
        if not 1 <= len(sides) <= 2 or len(sides) != len(value.split("x")):
            self.fail(f"{value!r} is neither a number of pixels nor HEIGHTxWIDTH, such as 224x448", param, ctx)
        return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def write_options(command: Command) -> Command:
    """Options that say how a model is written; the command gets them as keyword arguments for `export_options`."""
    for option in reversed(
        [
            click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to create."),
            click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True,
                         help="Number format of the weights."),
            click.option("--features-only", is_flag=True, help="Leave the head out."),
            click.option("--img-size", type=_ImageSize(), help="Resize the position embedding for images of SIZE or "
                         "HEIGHTxWIDTH pixels."),
            click.option("--pos-embed", type=_RESAMPLINGS, help="How; what the format's target does if left out."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def read_options(command: Command) -> Command:
    """Options that say what a file is that does not say it itself."""
    for option in reversed(
        [
            click.argument("overrides", nargs=-1, metavar="[model.KEY=VALUE]..."),
            click.option("--from", "from_", type=click.Choice(list(READERS)),
                         help="Format of SOURCE; found by looking if left out."),
            click.option("--model", metavar="NAME",
                         help="What a file without a config is, as `vitscale models` lists it."),
            click.option("--labels", type=click.Path(path_type=Path),
                         help="Text file with a class name a line, in label order."),
            click.option("--unsafe-pickle", is_flag=True,
                         help="Execute what a DeepSpeed checkpoint pickles beside its tensors, if it is refused "
                         "without. It can do whatever you can: only for files of people you trust."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def format_option(default: str | None) -> Callable[[Command], Command]:
    """The option that names the format to write; without a default it must be given."""
    return click.option(
        "--format", "format_", type=click.Choice(list(FORMATS)), default=default, required=default is None,
        show_default=default is not None, help="What to write.",
    )  # fmt: skip


verify_option = click.option(
    "--verify", is_flag=True, help="Compare with the target library's own model, block by block, in float64."
)


def export_options(format_: str, verify: bool = False, **chosen: Any) -> ExportOptions:
    """The options of `write_options` and their companions as one value."""
    return ExportOptions(format=format_, verify=verify, **chosen)


def changes_of_weights(**chosen: Any) -> list[str]:
    """Which of the options of `write_options` were given."""
    idle = ExportOptions()
    return [f"--{key.replace('_', '-')}" for key, value in chosen.items() if value != getattr(idle, key)]


def hints(model: str | None, labels: Path | None, overrides: tuple[str, ...], unsafe_pickle: bool = False) -> Hints:
    """What the options of `read_options` say about a file.

    Raises:
        CheckpointError: the list of labels cannot be read, there is no such variant, or an override is none.
    """
    if model is not None and model not in VARIANTS:
        raise CheckpointError(f"--model {model}: unknown: `vitscale models` lists the names")
    names: tuple[str, ...] = ()
    if labels is not None:
        try:
            names = tuple(labels.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"--labels {labels}: cannot be read: {error}") from None
        if "" in map(str.strip, names):
            raise CheckpointError(f"--labels {labels}: line {[*map(str.strip, names)].index('') + 1} is empty")
    return Hints(model, _changes(overrides), names, unsafe_pickle)


def report(certificate: Certificate, out: Path) -> None:
    """Say what was written and how far it can be trusted."""
    trip, found = certificate.round_trip, certificate.verification
    size_mb = sum(file.size_bytes for file in certificate.files) / 1e6
    click.echo(
        f"{out}: {certificate.format}, {certificate.precision}, {size_mb:.1f} MB, from {certificate.origin['path']}"
    )
    click.echo(f"read back: {trip.tensors} tensors, {trip.elements:,} values, bitwise equal")
    if found is None:
        click.echo(f"peak memory {peak_rss_bytes() / 1e6:.0f} MB")
    else:
        worst = max([*found.blocks, found.features, found.output])
        click.echo(
            f"verified against {found.library}: largest difference {worst:.1e} over {len(found.blocks)} blocks, "
            f"features and {found.output_is} (largest value {found.largest:.1f}), float64, {found.seconds:.1f} s, "
            f"{found.peak_rss_bytes / 1e6:.0f} MB more memory"
        )
        if found.tanh_gelu is not None:
            click.echo(f"  GELU in Google's tanh form moves the {found.output_is} by up to {found.tanh_gelu:.1e}")
    for note in certificate.notes:
        click.echo(f"note: {note}")
    click.echo(f"certificate: {out / CERTIFICATE_NAME}")


def _changes(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The `model.KEY=VALUE` words, validated as a config's model section is."""
    found: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.removeprefix("model.").partition("=")
        if not word.startswith("model.") or not equals or not key:
            raise CheckpointError(f"override {word!r}: write model.KEY=VALUE, such as model.act=gelu")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise CheckpointError(f"override {word!r}: the value is not valid YAML; quote it for the shell") from None
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.5)
            raise CheckpointError(
                f"override {word!r}: " + (f"did you mean model.{near[0]}?" if near else "unknown key")
            )
    try:
        section = ModelSection.model_validate({"name": "", "num_classes": 0, **found})
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"override model.{problem['loc'][0]}: {problem['msg']}") from None
    return {key: value for key in found if (value := getattr(section, key)) is not None}
