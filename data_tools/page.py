"""The page of `vitscale-data inspect`: one HTML file that needs no other, and asks the network for nothing."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.contact_sheet import caption
from data_tools.histogram import bars_svg, histogram_svg, log_histogram
from data_tools.mixing import LEAST_SCORE, Mixing
from data_tools.page_style import STYLE
from data_tools.pictures import Picture
from data_tools.quantities import byte_size, counted
from data_tools.rejected import Rejects, ShownReject
from data_tools.stats import QUANTILES, Quantiles, SplitColumns, SplitStats
from vitscale.data.index import Dataset
from vitscale.data.labels import class_name

# Nothing but what stands in the file itself, even if a key tried to bring something in.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

JPEG_QUALITY = 82
CLASSES_SHOWN = 12


@dataclass(frozen=True)
class PageContent:
    """What the page shows of a split."""

    folder: Path
    dataset: Dataset
    split: str
    columns: SplitColumns
    stats: SplitStats
    pictures: Sequence[Picture]
    seed: int
    rejects: Rejects | None


def render(content: PageContent) -> str:
    """The page as HTML."""
    name = escape(content.folder.resolve().name)
    sections = (
        _summary(content),
        _mixing(content.stats.mixing),
        _samples(content),
        _distributions(content.columns, content.stats),
        _classes(content.columns),
        _rejects(content.rejects),
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{name}, {escape(content.split)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{name}, split {escape(content.split)}</h1>
<p class="faint"><code>{escape(str(content.folder.resolve()))}</code></p>
</header>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n"


def _summary(content: PageContent) -> str:
    dataset, stats = content.dataset, content.stats
    others = [f"{name} {counted(files.samples)}" for name, files in dataset.splits.items() if name != content.split]
    unreadable = f", {counted(stats.unreadable)} of them cannot be read" if stats.unreadable else ""
    facts = {
        "Samples": f"{counted(stats.samples)} ({byte_size(stats.image_bytes)}){unreadable}",
        "Shards": f"{counted(stats.shards)} ({byte_size(stats.shard_bytes)})",
        "Other splits": ", ".join(others) or "none",
        "Label space": dataset.label_space or "of its own",
        "Classes": f"{counted(stats.classes_present)} of {counted(stats.classes)} have images",
        "Imbalance": f"Gini {stats.gini:.3f}, as varied as {counted(stats.effective_classes)} equal classes",
        "Seed": str(dataset.seed),
        "Hash": dataset.hash[:16],
    }
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{escape(value)}</td></tr>' for name, value in facts.items())
    return _section("Summary", f"<table>{rows}</table>")


def _mixing(mixing: Mixing) -> str:
    well = mixing.score >= LEAST_SCORE
    advice = "" if well else " Neighbours in the shards share classes: shuffle the dataset as a whole."
    return _section(
        "Mixing",
        f'<p><span class="score {"good" if well else "alarm"}">{mixing.score:.3f}</span> '
        f"(at least {LEAST_SCORE} is well mixed)</p>\n"
        f"<p>A batch of {counted(mixing.batch)} in training order has {mixing.distinct:.1f} classes on average; after "
        f"a full shuffle it would have {mixing.ideal:.1f}. The order has {mixing.lanes} lanes and blocks of "
        f"{mixing.block} samples.{advice}</p>",
    )


def _samples(content: PageContent) -> str:
    figures = "".join(map(_sample, content.pictures))
    return _section(
        "Samples",
        f"<p>{counted(len(content.pictures))} of {counted(content.stats.samples)}, drawn with the seed {content.seed}. "
        f'Hover over one for its key and place.</p>\n<div class="grid">{figures}</div>',
    )


def _sample(picture: Picture) -> str:
    name, wnid, size = map(escape, caption(picture))
    size = size.replace(" ", "&nbsp;").replace(",&nbsp;", ", ")  # a number stays with its unit
    place = f"{picture.key} in {picture.shard} at byte {picture.offset}"
    image = _mounted(picture.image, picture.name, f"cannot be read: {picture.fault}")
    return (
        f'<figure title="{escape(place)}">{image}<figcaption>{name}<span>{wnid}</span><span>{size}</span>'
        "</figcaption></figure>\n"
    )


def _mounted(image: Image.Image | None, description: str, fault: str) -> str:
    if image is None:
        return f'<div class="mount"><p>{escape(fault)}</p></div>'
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<div class="mount"><img src="data:image/jpeg;base64,{data}" alt="{escape(description)}" '
        f'width="{image.width}" height="{image.height}"></div>'
    )


def _distributions(columns: SplitColumns, stats: SplitStats) -> str:
    class_images = columns.class_images()
    charts: dict[str, tuple[NDArray[Any], str, str]] = {
        "Images a class": (class_images[class_images > 0], "images a class", "classes"),
        "Shorter side": (columns.short_edge_px(), "shorter side, pixels", "images"),
        "File size": (columns.size_bytes, "file size, bytes", "images"),
    }
    drawn = [
        _chart(title, histogram_svg(log_histogram(values), title=title, x_name=x_name, y_name=y_name))
        for title, (values, x_name, y_name) in charts.items()
        if len(values)
    ]
    drawn.append(_chart("Format", bars_svg(columns.format_images(), title="Images of each format")))
    return _section(
        "Distributions",
        f'<div class="wide">{_quantile_table(stats)}</div>\n<div class="columns">{"".join(drawn)}</div>\n'
        '<p class="faint">Axes of numbers and bytes are logarithmic.</p>',
    )


def _quantile_table(stats: SplitStats) -> str:
    rows: dict[str, tuple[Quantiles, Callable[[float], str]]] = {
        "Images a class": (stats.class_images, counted),
        "Shorter side, px": (stats.short_edge_px, counted),
        "Megapixels": (stats.megapixels, "{:.3g}".format),
        "File size": (stats.size_bytes, byte_size),
    }
    heads = "".join(f'<th scope="col" class="number">{name}</th>' for name in QUANTILES)
    body = ""
    for name, (quantiles, text) in rows.items():
        cells = "".join(f'<td class="number">{text(value)}</td>' for value in quantiles.values())
        body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    return f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _chart(title: str, svg: str) -> str:
    return f"<figure><h3>{title}</h3>{svg}</figure>\n"


def _classes(columns: SplitColumns) -> str:
    images = columns.class_images()
    present = np.flatnonzero(images)
    ascending = present[np.argsort(images[present], kind="stable")]
    shown = min(CLASSES_SHOWN, len(present))
    most = _class_table("Most images", ascending[::-1][:shown], images, columns.classes)
    least = _class_table("Fewest images", ascending[:shown], images, columns.classes)
    return _section("Classes", f'<div class="columns">{most}{least}</div>')


def _class_table(title: str, labels: NDArray[np.int64], images: NDArray[np.int64], classes: Sequence[str]) -> str:
    rows = "".join(
        f'<tr><td>{escape(class_name(classes[label]))}</td><td class="faint">{escape(classes[label])}</td>'
        f'<td class="number">{label}</td><td class="number">{counted(images[label])}</td></tr>'
        for label in labels
    )
    heads = (
        '<th scope="col">class</th><th scope="col">wnid</th><th scope="col" class="number">label</th>'
        '<th scope="col" class="number">images</th>'
    )
    return (
        f'<div><h3>{title}</h3><div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        "</div></div>"
    )


def _rejects(rejects: Rejects | None) -> str:
    if rejects is None:
        return _section("Rejects", "<p>The shards were indexed, not built: nothing was left out.</p>")
    if not rejects.total:
        return _section("Rejects", "<p>None: the source had no bad image.</p>")
    rows = "".join(
        f'<tr><td class="number">{counted(images)}</td><td>{escape(kind)}</td></tr>'
        for kind, images in rejects.kinds.items()
    )
    table = (
        '<table><thead><tr><th scope="col" class="number">images</th><th scope="col">reason</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
    shown = "".join(map(_reject, rejects.shown))
    return _section(
        "Rejects",
        f'<div class="wide">{table}</div>\n<p>{counted(len(rejects.shown))} of {counted(rejects.total)}, some of each '
        f'reason; of a damaged image, what can be seen of it.</p>\n<div class="grid">{shown}</div>',
    )


def _reject(reject: ShownReject) -> str:
    image = _mounted(reject.image, f"what is left of {reject.key}", "nothing to see")
    name = escape(class_name(reject.wnid))
    return (
        f'<figure title="{escape(reject.key)}">{image}<figcaption>{escape(reject.reason)}<span>{name}</span>'
        f"<span>{escape(reject.source)}</span></figcaption></figure>\n"
    )
