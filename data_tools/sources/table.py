"""The source `parquet`: Parquet or Arrow files with a column of images, as Hugging Face `datasets` keeps them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.progress import progress
from data_tools.sources.listing import Listing, Stretch, listing_of, rows_of, split_of
from data_tools.sources.spool import add_tar, is_spooled, mark_spooled, need_room
from data_tools.tar_scan import scan_tar
from data_tools.ustar import END_OF_TAR, MAX_NAME_BYTES, entry
from data_tools.workers import ordered_map
from vitscale.data.decode import sniff
from vitscale.errors import ShardError

SUFFIXES = (".parquet", ".arrow", ".feather")
LABEL_COLUMNS = ("wnid", "label", "labels", "cls", "class")
BATCH_ROWS = 128


@dataclass(frozen=True)
class TableColumns:
    """Which columns hold image and label (None: found by name); `classes` are the names behind numeric labels."""

    image: str | None
    label: str | None
    classes: tuple[str, ...] | None


def list_tables(source: Path, columns: TableColumns, spool: Path, workers: int) -> Listing:
    """Images of a Parquet or Arrow file, or of all such files in a folder, once they lie in the spool.

    Raises:
        ShardError: no such files, no image or label column, labels without names, or too little room on the disk.
    """
    found = [source] if source.is_file() else sorted(source.rglob("*"))
    files = [path for path in found if path.suffix in SUFFIXES]
    if not files:
        raise ShardError(f"{source}: holds no {', '.join(SUFFIXES)} files: give a table or a folder of them")
    tars = [f"{number:06d}.tar" for number in range(len(files))]
    identity = "\n".join(f"{file.resolve()} {file.stat().st_size}" for file in files)
    if not is_spooled(spool, f"{columns}\n{identity}"):
        missing = [place for place, tar in enumerate(tars) if not (spool / tar).exists()]
        need_room(spool, sum(files[place].stat().st_size for place in missing))
        write = partial(_spool_table, files=files, columns=columns, spool=spool)
        for _ in progress(ordered_map(write, missing, workers), len(missing), "table"):
            pass
        mark_spooled(spool, f"{columns}\n{identity}")
    splits = [split_of(file.stem) or split_of(file.parent.name) for file in files]
    paths = [spool / tar for tar in tars]
    stretches = [
        Stretch(path, place, split=split) for place, (path, split) in enumerate(zip(paths, splits, strict=True))
    ]
    return listing_of(spool, paths, stretches, _scan_spooled, workers)


def _scan_spooled(stretch: Stretch) -> pa.Table:
    members = scan_tar(stretch.path)
    return rows_of(
        stretch, ((member.name, member.name.split("/")[0], member.offset, member.size) for member in members)
    )


def _spool_table(place: int, files: Sequence[Path], columns: TableColumns, spool: Path) -> None:
    add_tar(spool, f"{place:06d}.tar", _entries(place, files[place], columns))


def _entries(place: int, file: Path, columns: TableColumns) -> Iterator[bytes]:
    """A tar of CLASS/NAME members, one a row."""
    schema = _schema(file)
    image_column, label_column = _find_columns(file, schema, columns)
    names = columns.classes or _class_names(schema, label_column)
    row = 0
    for batch in _batches(file, [image_column, label_column]):
        for image, label in zip(batch[image_column].to_pylist(), batch[label_column].to_pylist(), strict=True):
            data, path = _image(image, f"{file}: row {row}")
            wnid = _wnid(label, names, f"{file}: row {row}")
            yield b"".join(entry(_member_name(wnid, path, data, f"{place:06d}_{row:08d}"), data))
            row += 1
    yield END_OF_TAR


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file) if file.suffix == ".parquet" else _open_arrow(file).schema
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{file}: not a readable table ({error}): download it again") from None


def _open_arrow(file: Path) -> Any:
    """An Arrow file; `datasets` writes the streaming form under the same suffix."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(file)))
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(file)))


def _batches(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
                    yield pa.Table.from_batches([batch])
            return
        reader = _open_arrow(file)
        stream = isinstance(reader, pa.RecordBatchStreamReader)
        batches = iter(reader) if stream else map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            for first in range(0, len(batch), BATCH_ROWS):
                yield pa.Table.from_batches([batch.slice(first, BATCH_ROWS)]).select(columns)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{file}: not a readable table ({error}): download it again") from None


def _find_columns(file: Path, schema: pa.Schema, columns: TableColumns) -> tuple[str, str]:
    has = f"its columns are {', '.join(schema.names)}"
    image = columns.image or next((field.name for field in schema if _holds_images(field.type)), None)
    if image is None or image not in schema.names or not _holds_images(schema.field(image).type):
        raise ShardError(f"{file}: no image column {image or ''}({has}): name a binary one with --image-column")
    label = columns.label or next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if label is None or label not in schema.names:
        raise ShardError(f"{file}: no label column {label or ''}({has}): name one with --label-column")
    return image, label


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """Names that `datasets` keeps beside numeric labels."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = stored.get("info", {}).get("features", {}).get(label, {}).get("names")
    return tuple(names) if names else None


def _image(value: Any, where: str) -> tuple[bytes, str]:
    """Bytes and path of an image; no bytes at all are an image that cannot be read, which the build then names."""
    if not isinstance(value, dict):
        return value or b"", ""
    if value["bytes"] is None and value.get("path"):
        raise ShardError(
            f"{where}: holds a path, {value['path']}, in place of the image: embed the images in the table"
        )
    return value["bytes"] or b"", value.get("path") or ""


def _wnid(label: Any, names: Sequence[str] | None, where: str) -> str:
    if isinstance(label, int):
        if names is None or not 0 <= label < len(names):
            count = f"{len(names)} class names" if names else "no class names"
            raise ShardError(f"{where}: label {label}, with {count}: give the list of wnids with --source-classes")
        label = names[label]
    if not isinstance(label, str) or len(label.split()) != 1 or "/" in label:
        raise ShardError(f"{where}: class {label!r} is no wnid: give the list of wnids with --source-classes")
    return label


def _member_name(wnid: str, path: str, data: bytes, place: str) -> str:
    """CLASS/NAME with the name that the table tells, or else one made of the image's place."""
    told = f"{wnid}/{PurePosixPath(path).name}"
    if path and len(told.encode()) <= MAX_NAME_BYTES:
        return told
    return f"{wnid}/{place}.{sniff(data) or 'unknown'}"
