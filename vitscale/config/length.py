"""Lengths of a run and of its parts: one type, whatever they are counted in."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, InstanceOf, PlainSerializer, WithJsonSchema

Unit = Literal["steps", "images", "epochs", "percent"]

_UNITS: dict[str, Unit] = {
    "": "steps",
    "step": "steps",
    "steps": "steps",
    "image": "images",
    "images": "images",
    "epoch": "epochs",
    "epochs": "epochs",
    "%": "percent",
    "percent": "percent",
}
_PATTERN = re.compile(r"([-+.\deE]+)\s*(\S*)")


@dataclass(frozen=True)
class Length:
    """An amount of training: optimizer steps, images, passes over the training data, or percent of the run."""

    amount: float
    unit: Unit

    def __str__(self) -> str:
        """As a config has it, such as `90 epochs`."""
        return f"{self.amount:.15g} {'%' if self.unit == 'percent' else self.unit}"


def parse_length(value: Any) -> Any:
    """The length that a config's `90 epochs`, `1e9 images`, `3 %` or bare 10000 (steps) stands for.

    Raises:
        ValueError: it is no number, has no unit of these, is negative, counts a part of a step, or is over 100 %.
    """
    if isinstance(value, Length):
        return value
    found = _PATTERN.fullmatch(str(value).strip()) if isinstance(value, str | int | float) else None
    try:
        amount = float(found[1]) if found else None
    except ValueError:
        amount = None
    unit = _UNITS.get(found[2]) if found else None
    if amount is None or unit is None or isinstance(value, bool):
        raise ValueError("give a number of steps, or a text such as 90 epochs, 1e9 images or 3 %")
    if not 0 <= amount < float("inf"):
        raise ValueError("a length is not negative")
    if unit in ("steps", "images") and amount != int(amount):
        raise ValueError(f"give whole {unit}")
    if unit == "percent" and amount > 100:
        raise ValueError("give at most 100 %")
    return Length(amount, unit)


LengthField = Annotated[
    InstanceOf[Length],
    BeforeValidator(parse_length),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": ["string", "integer"]}),
]
"""A length as a field of a config: read from text or a number, written as text."""
