"""A look into a dataset: a contact sheet, and a page with samples, distributions, classes and rejects."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.contact_sheet import draw_contact_sheet
from data_tools.page import PageContent, render
from data_tools.pictures import choose, read_pictures
from data_tools.quantities import counted
from data_tools.rejected import read_rejects
from data_tools.stats import describe, read_columns, require_split
from vitscale.data.index import read_dataset
from vitscale.errors import ConfigError

SHEET_FILE = "contact-sheet.png"
PAGE_FILE = "index.html"


@dataclass(frozen=True)
class InspectReport:
    """The files that were written, and how many samples they show."""

    sheet: Path
    page: Path
    samples: int
    unreadable: int
    rejects: int

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.sheet}: {self.samples} samples, {self.unreadable} of them cannot be read",
            f"{self.page}: the same, with distributions, classes and {counted(self.rejects)} rejects",
        ]

    def tree(self) -> dict[str, Any]:
        """For machines."""
        return {**vars(self), "sheet": str(self.sheet), "page": str(self.page)}


def inspect(
    folder: Path, out: Path, *, split: str | None, samples: int, seed: int, batch: int, lanes: int, block: int
) -> InspectReport:
    """Write a contact sheet and a page about one split of a dataset.

    Args:
        folder: of the dataset.
        out: folder to write into; files of an earlier report are replaced.
        split: its name; None for train, or the first if there is no train.
        samples: how many to show.
        seed: of the choice of samples.
        batch: samples a batch, for mixing.
        lanes: of the training order, for mixing.
        block: of the training order, for mixing.

    Raises:
        ConfigError: `out` is the dataset's folder or cannot be written.
        ShardError: there is no finished dataset, or no such split, or an index is damaged, or a shard is missing or
            not on this machine.
    """
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--out {out}: is the dataset's folder, which holds its files alone: name another")
    dataset = read_dataset(folder)
    default = "train" if "train" in dataset.splits else next(iter(dataset.splits))
    name = require_split(folder, dataset, split or default)
    columns = read_columns(folder, dataset, name, None)
    pictures = read_pictures(folder, dataset, name, choose(columns.rows, samples, seed))
    rejects = read_rejects(folder)
    content = PageContent(
        folder=folder,
        dataset=dataset,
        split=name,
        columns=columns,
        stats=describe(dataset, name, columns, batch=batch, lanes=lanes, block=block),
        pictures=pictures,
        seed=seed,
        rejects=rejects,
    )
    title = f"{folder.resolve().name}, split {name}: {counted(len(pictures))} of {counted(len(columns))} samples"
    report = InspectReport(
        sheet=out / SHEET_FILE,
        page=out / PAGE_FILE,
        samples=len(pictures),
        unreadable=sum(picture.image is None for picture in pictures),
        rejects=rejects.total if rejects else 0,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw_contact_sheet(title, pictures).save(report.sheet)
        report.page.write_text(render(content), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error}): name another folder") from None
    return report
