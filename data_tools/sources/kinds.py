"""The kinds of source that `--source KIND PATH` knows."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from data_tools.sources.class_tars import list_class_tars
from data_tools.sources.fall11 import list_fall11
from data_tools.sources.image_folder import list_image_folder
from data_tools.sources.listing import Listing
from data_tools.sources.shards import list_shards
from data_tools.sources.table import TableColumns, list_tables
from data_tools.sources.winter21_gz import list_winter21_gz

SourceKind = Literal["class-tars", "fall11", "winter21-gz", "image-folder", "parquet", "shards"]


class Source(BaseModel):
    """A source as a plan records it; columns are for `parquet`, classes for it and for `shards`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: SourceKind
    path: Path
    image_column: str | None = None
    label_column: str | None = None
    classes: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


def list_images(source: Source, spool: Path, workers: int) -> Listing:
    """List a source in `workers` processes, after copying it into `spool` if it cannot be read in any order.

    Raises:
        ShardError: the source is not what its kind says, or is damaged.
    """
    match source.kind:
        case "class-tars":
            return list_class_tars(source.path, workers)
        case "fall11":
            return list_fall11(source.path, workers)
        case "winter21-gz":
            return list_winter21_gz(source.path, spool, workers)
        case "image-folder":
            return list_image_folder(source.path, workers)
        case "parquet":
            columns = TableColumns(source.image_column, source.label_column, source.classes)
            return list_tables(source.path, columns, spool, workers)
        case "shards":
            return list_shards(source.path, source.classes, workers)
