"""`vitscale-data` as tests run it, and small sources for it."""

import contextlib
import io
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from data_tools.cli import main

WNIDS = ("n00000002", "n00000001", "n00000003")
A_CLASS = 20


@dataclass
class Result:
    """How the command ended."""

    status: int
    stdout: str
    stderr: str


def vitscale_data(*words: object) -> Result:
    """Run the command in this process, in one process unless --workers says otherwise."""
    words = tuple(map(str, words))
    if words[0] in ("plan", "build") and "--workers" not in words:
        words = (*words, "--workers", "1")
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        mock.patch.object(sys, "argv", ["vitscale-data", *words]),
    ):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code
    return Result(status, stdout.getvalue(), stderr.getvalue())


def refused(result: Result) -> str:
    """The one line in which the command tells its user's error."""
    assert result.status == 2, result
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def succeeded(result: Result) -> Result:
    """The result of a command that did what it was told."""
    assert result.status == 0, result
    return result


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """A small image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """A tar by the standard library."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def pictures() -> dict[str, dict[str, bytes]]:
    """Images by wnid and name: three classes of 20, the first of each a PNG whose name says JPEG."""
    return {
        wnid: {f"{wnid}_{i}.JPEG": picture(100 * c + i, "PNG" if i == 0 else "JPEG") for i in range(A_CLASS)}
        for c, wnid in enumerate(WNIDS)
    }


def write_class_tars(folder: Path, classes: Mapping[str, Mapping[str, bytes]]) -> Path:
    """One tar a class."""
    folder.mkdir(parents=True)
    for wnid, members in classes.items():
        write_tar(folder / f"{wnid}.tar", members)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
