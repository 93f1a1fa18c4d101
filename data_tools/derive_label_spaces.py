"""Derives the files of `vitscale/data/label_spaces/` from their sources, none of which the package needs.

    python -m data_tools.derive_label_spaces --wordnet /usr/share/wordnet --people people

Sources: the lists of classes in the folder `timm/data/_info` of an installed timm; WordNet 3.0's `data.noun`
(Debian's package wordnet-base); and, for the winter 2021 release, the two tables that Yang et al. 2020
published: https://image-net.org/data/synsets_safety.csv and https://image-net.org/data/imageability_scores.csv
"""

import csv
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click

from vitscale.data.labels import LABEL_SPACES_FOLDER
from vitscale.errors import ConfigError, VitscaleError

WINTER21 = "in21k_winter21"
SAFETY_TABLE = "synsets_safety.csv"
IMAGEABILITY_TABLE = "imageability_scores.csv"
MIN_IMAGEABILITY = 4.0
"""Of 5. Below it Yang et al. 2020 call a class non-imageable; with it 158 classes remain, as they report."""


@dataclass(frozen=True)
class Recipe:
    """How one label space comes about: from timm's list of this name, or, without one, from Yang et al.

    Its file says how it differs from the classes of `bases`, one space after the other.
    """

    classes: int
    list_name: str | None
    bases: tuple[str, ...]
    header: str


RECIPES: Mapping[str, Recipe] = {
    "in21k_fall11": Recipe(
        21_841,
        "imagenet22k_synsets.txt",
        (),
        "Classes of ImageNet's fall 2011 release (fall11_whole.tar), sorted.\nFrom timm's imagenet22k_synsets.txt.",
    ),
    "in21k_google": Recipe(
        21_843,
        "imagenet21k_goog_synsets.txt",
        ("in21k_fall11",),
        "Classes of Google's checkpoints (BiT, ViT, AugReg), sorted: those of fall 2011 and two others.\n"
        "From timm's imagenet21k_goog_synsets.txt.",
    ),
    "in1k": Recipe(
        1_000,
        "imagenet_synsets.txt",
        (),
        "Classes of ILSVRC 2012 (ImageNet-1k), sorted.\nFrom timm's imagenet_synsets.txt.",
    ),
    "in22k_ms": Recipe(
        21_842,
        "imagenet22k_ms_synsets.txt",
        ("in1k", "in21k_fall11"),
        "Classes of Microsoft's checkpoints: ILSVRC's with their labels, then the others of fall 2011, sorted.\n"
        "One of ILSVRC's is not in fall 2011: n04399382 (teddy).\n"
        "From timm's imagenet22k_ms_synsets.txt.",
    ),
    WINTER21: Recipe(
        19_167,
        None,
        ("in21k_fall11",),
        "Classes of ImageNet's winter 2021 release (winter21_whole.tar.gz), sorted: those of fall 2011 without\n"
        "2,674 of the 2,832 below person (n00007846). Kept are the 158 that Yang et al. 2020 (Towards fairer\n"
        "datasets) call safe and score 4 of 5 or more in imageability.\n"
        f"Derived from their tables {SAFETY_TABLE} and {IMAGEABILITY_TABLE}. Checked: the result equals the\n"
        "list of the release's classes in birder-project/birder, and it holds in21k_p_winter21 and none of the\n"
        "771 classes that in21k_p_fall11 has beyond that.",
    ),
    "in21k_p_fall11": Recipe(
        11_221,
        "imagenet21k_miil_synsets.txt",
        (),
        "Classes of ImageNet-21k-P from the fall 2011 release, sorted: those with 500 images or more (Ridnik et\n"
        "al. 2021, ImageNet-21K pretraining for the masses).\n"
        "From timm's imagenet21k_miil_synsets.txt.",
    ),
    "in21k_p_winter21": Recipe(
        10_450,
        "imagenet21k_miil_w21_synsets.txt",
        ("in21k_p_fall11",),
        "Classes of ImageNet-21k-P from the winter 2021 release, sorted: those of in21k_p_fall11 that are in\n"
        "in21k_winter21.\n"
        "From timm's imagenet21k_miil_w21_synsets.txt.",
    ),
    "in12k": Recipe(
        11_821,
        "imagenet12k_synsets.txt",
        ("in21k_p_fall11",),
        "Classes of timm's ImageNet-12k, sorted: those of fall 2011 with 440 images or more, so in21k_p_fall11\n"
        "and 600 others.\n"
        "From timm's imagenet12k_synsets.txt.",
    ),
}
WORDNET_HEADER = """\
Every class of every label space and all that is above it in WordNet 3.0, sorted: wnid, hypernyms (instance
hypernyms too), first word. From data.noun. Copyright 2006 by Princeton University: see WORDNET_LICENSE.txt."""


class Noun(NamedTuple):
    """A noun synset of WordNet: its first word, what it is a kind of, and what it is an instance of."""

    name: str
    kind_of: tuple[str, ...]
    instance_of: tuple[str, ...]


def read_nouns(data_noun: Path) -> dict[str, Noun]:
    """Noun synsets by wnid (n and the synset's offset), from WordNet's `data.noun`; wndb(5WN) has the format."""
    nouns = {}
    for line in data_noun.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the license
            continue
        fields = line.split(" | ")[0].split()
        words = int(fields[3], 16)
        pointers = fields[5 + 2 * words :]
        related = list(zip(pointers[0::4], pointers[1::4], strict=True))
        nouns[f"n{fields[0]}"] = Noun(
            name=fields[4].replace("_", " "),
            kind_of=tuple(f"n{offset}" for symbol, offset in related if symbol == "@"),
            instance_of=tuple(f"n{offset}" for symbol, offset in related if symbol == "@i"),
        )
    return nouns


def derive_winter21(fall11: Sequence[str], safety: Path, imageability: Path) -> list[str]:
    """Classes of winter 2021: those of fall 2011 less the people that Yang et al. filter out."""
    with safety.open(encoding="utf-8", newline="") as file:
        people = {row["wnid"]: row["safety"] for row in csv.DictReader(file)}
    with imageability.open(encoding="utf-8", newline="") as file:
        scores = {row["wnid"]: float(row["imageability score"]) for row in csv.DictReader(file)}
    kept = {wnid for wnid, verdict in people.items() if verdict == "safe" and scores.get(wnid, 0.0) >= MIN_IMAGEABILITY}
    return [wnid for wnid in fall11 if wnid not in people or wnid in kept]


def render_space(recipe: Recipe, spaces: Mapping[str, Sequence[str]], wnids: Sequence[str]) -> str:
    """A file of `label_spaces/`: the whole list, or how it differs from the recipe's bases among `spaces`."""
    if not recipe.bases:
        return _file(recipe.header, wnids)
    base = dict.fromkeys(wnid for name in recipe.bases for wnid in spaces[name])
    here = set(wnids)
    removed = [f"- {wnid}" for wnid in base if wnid not in here]
    added = [f"+ {wnid} {label}" for label, wnid in enumerate(wnids) if wnid not in base]
    return _file(recipe.header, [*(f"all {name}" for name in recipe.bases), *removed, *added])


def render_wordnet(wnids: Iterable[str], nouns: Mapping[str, Noun]) -> str:
    """The file `wordnet.tsv` for classes and all that is above them."""
    found: set[str] = set()
    waiting = list(wnids)
    while waiting:
        wnid = waiting.pop()
        if wnid not in found:
            found.add(wnid)
            waiting.extend((*nouns[wnid].kind_of, *nouns[wnid].instance_of))
    rows = ((wnid, nouns[wnid]) for wnid in sorted(found))
    return _file(
        WORDNET_HEADER,
        (f"{wnid}\t{' '.join((*noun.kind_of, *noun.instance_of))}\t{noun.name}" for wnid, noun in rows),
    )


def derive_spaces(lists: Path, people: Path | None = None) -> dict[str, list[str]]:
    """Classes of every label space by name; without `people` that of winter 2021 is left out.

    Args:
        lists: folder with timm's lists.
        people: folder with the two tables of Yang et al.

    Raises:
        ConfigError: a source gives another number of classes than is known.
        OSError: a source cannot be read.
    """
    spaces: dict[str, list[str]] = {}
    for name, recipe in RECIPES.items():
        if recipe.list_name is not None:
            spaces[name] = (lists / recipe.list_name).read_text(encoding="ascii").split()
        elif people is not None:
            fall11 = spaces["in21k_fall11"]
            spaces[name] = derive_winter21(fall11, people / SAFETY_TABLE, people / IMAGEABILITY_TABLE)
    for name, wnids in spaces.items():
        if len(wnids) != RECIPES[name].classes:
            raise ConfigError(
                f"{name}: its source gives {len(wnids)} classes, {RECIPES[name].classes} are known: "
                "take timm 1.0.31, and the tables as they were published"
            )
    return spaces


@click.command(epilog="Example: python -m data_tools.derive_label_spaces --wordnet /usr/share/wordnet --people people")
@click.option("--wordnet", required=True, type=click.Path(path_type=Path), help="Folder with WordNet 3.0's data.noun.")
@click.option(
    "--people",
    type=click.Path(path_type=Path),
    help=f"Folder with {SAFETY_TABLE} and {IMAGEABILITY_TABLE}; without it {WINTER21}.txt stays as it is.",
)
@click.option("--out", default=LABEL_SPACES_FOLDER, type=click.Path(path_type=Path), help="Folder to write.")
def cli(wordnet: Path, people: Path | None, out: Path) -> None:
    """Derive the label spaces' files again."""
    try:
        spaces = derive_spaces(timm_lists(), people)
        nouns = read_nouns(wordnet / "data.noun")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}: give the folder that holds it") from None
    for name, wnids in spaces.items():
        text = render_space(RECIPES[name], spaces, wnids)
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
    text = render_wordnet({wnid for wnids in spaces.values() for wnid in wnids}, nouns)
    (out / "wordnet.tsv").write_text(text, encoding="utf-8")
    click.echo(f"{out}: wrote {', '.join(spaces)} and wordnet.tsv")


def timm_lists() -> Path:
    """The folder with timm's lists of classes.

    Raises:
        ConfigError: timm is not installed.
    """
    timm = importlib.util.find_spec("timm")
    if timm is None or timm.origin is None:
        raise ConfigError("timm: not installed: pip install timm, whose lists of classes are one of the sources")
    return Path(timm.origin).parent / "data" / "_info"


def _file(header: str, lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in [*(f"# {line}" for line in header.splitlines()), *lines])


def main() -> None:
    """Run the command; an error its user can mend is one line on stderr and the error's exit status."""
    try:
        cli(prog_name="python -m data_tools.derive_label_spaces")
    except VitscaleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.status)


if __name__ == "__main__":
    main()
