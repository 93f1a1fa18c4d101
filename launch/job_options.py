"""The options of submit.py that describe the job: one for every field of JobRequest."""

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click
from job_request import JobRequest, flag


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command an option for every field of a request."""
    for name in reversed(JobRequest.model_fields):
        command = _option(name)(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the command line gives a value."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _option(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Values stay text: JobRequest reads them, as it reads those of a file."""
    field = JobRequest.model_fields[name]
    assert field.description is not None
    told = field.description.removesuffix(".")
    if field.annotation is bool:
        option = flag(name)
        return click.option(
            f"{option}/--no-{option.removeprefix('--')}", name, default=None, help=f"{told}; yes when left out."
        )
    default = f" [{field.default}]" if field.default not in (None, (), 0) else ""
    repeated = isinstance(field.default, tuple)
    metavar = _metavar(field.annotation)
    return click.option(flag(name), name, metavar=metavar, multiple=repeated, help=f"{told}.{default}")


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return "NUMBER" if {int, float} & _parts(annotation) else "TEXT"


def _parts(annotation: Any) -> set[Any]:
    """All types that an annotation is put together from."""
    return {annotation}.union(*map(_parts, get_args(annotation))) if get_args(annotation) else {annotation}
