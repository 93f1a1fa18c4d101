import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_tools import derive_label_spaces
from data_tools.derive_label_spaces import (
    RECIPES,
    WINTER21,
    Noun,
    cli,
    derive_spaces,
    derive_winter21,
    main,
    read_nouns,
    render_space,
    render_wordnet,
    timm_lists,
)
from vitscale.data.labels import LABEL_SPACES, LABEL_SPACES_FOLDER, load_label_space
from vitscale.errors import ConfigError

DEBIAN_WORDNET = Path("/usr/share/wordnet/data.noun")

# Lines of WordNet 3.0, the glosses cut short.
DATA_NOUN = """\
  1 This software and database is being provided to you, the LICENSEE, by  
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | that which is perceived  
00001930 03 n 01 physical_entity 0 002 @ 00001740 n 0000 ~ 00002452 n 0000 | an entity that has | existence  
09450163 17 n 02 sun 0 Sun 2 003 @i 09444100 n 0000 #m 09439433 n 0000 %p 09244469 n 0000 | the star that is  
"""  # noqa: W291


def write_data_noun(folder: Path) -> Path:
    """The committed `wordnet.tsv` in the shape of WordNet's own file."""
    lines = ["  1 license  "]
    for line in (LABEL_SPACES_FOLDER / "wordnet.tsv").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            wnid, parents, name = line.split("\t")
            pointers = "".join(f" @ {parent[1:]} n 0000" for parent in parents.split())
            word = name.replace(" ", "_")
            lines.append(f"{wnid[1:]} 03 n 01 {word} 0 {len(parents.split()):03d}{pointers} | gloss  ")
    (folder / "data.noun").write_text("\n".join(lines) + "\n", encoding="ascii")
    return folder


def test_the_command_writes_what_is_committed(tmp_path: Path) -> None:
    wordnet, out = tmp_path / "wordnet", tmp_path / "out"
    wordnet.mkdir()
    out.mkdir()
    done = CliRunner().invoke(cli, ["--wordnet", str(write_data_noun(wordnet)), "--out", str(out)])
    assert done.exit_code == 0, done.output
    written = {path.name for path in out.iterdir()}
    assert written == {f"{name}.txt" for name in set(LABEL_SPACES) - {WINTER21}} | {"wordnet.tsv"}
    for name in written:
        assert (out / name).read_text() == (LABEL_SPACES_FOLDER / name).read_text(), name


@pytest.mark.skipif(not DEBIAN_WORDNET.exists(), reason="needs Debian's wordnet-base")
def test_the_committed_wordnet_is_debians() -> None:
    wnids = {wnid for name in LABEL_SPACES for wnid in load_label_space(name).wnids}
    assert render_wordnet(wnids, read_nouns(DEBIAN_WORDNET)) == (LABEL_SPACES_FOLDER / "wordnet.tsv").read_text()


def test_every_label_space_has_a_recipe() -> None:
    assert set(RECIPES) == set(LABEL_SPACES)


def test_the_committed_winter21_is_its_recipes_rendering() -> None:
    spaces = {name: load_label_space(name).wnids for name in LABEL_SPACES}
    text = render_space(RECIPES[WINTER21], spaces, spaces[WINTER21])
    assert text == (LABEL_SPACES_FOLDER / f"{WINTER21}.txt").read_text()


def write_people(folder: Path, verdicts: dict[str, str], scores: dict[str, float]) -> Path:
    rows = "".join(f'{wnid},"a, b",gloss,{verdict}\n' for wnid, verdict in verdicts.items())
    (folder / "synsets_safety.csv").write_text(f"wnid,synset,gloss,safety\n{rows}")
    rows = "".join(f'{wnid},"a, b","""so""",{score}\n' for wnid, score in scores.items())
    (folder / "imageability_scores.csv").write_text(f"wnid,synset,gloss,imageability score\n{rows}")
    return folder


def test_of_the_people_the_safe_and_imageable_stay(tmp_path: Path) -> None:
    verdicts = {"n1": "offensive", "n2": "safe", "n3": "safe", "n4": "sensitive", "n5": "safe"}
    people = write_people(tmp_path, verdicts, {"n1": 5, "n2": 4, "n3": 3.9, "n4": 4.5})
    tables = people / "synsets_safety.csv", people / "imageability_scores.csv"
    assert derive_winter21(["n0", "n1", "n2", "n3", "n4", "n5", "n6"], *tables) == ["n0", "n2", "n6"]


def test_a_source_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    people = write_people(tmp_path, {}, {})
    with pytest.raises(ConfigError, match="in21k_winter21: its source gives 21841 classes, 19167 are known"):
        derive_spaces(timm_lists(), people)


def test_nouns_are_read_with_names_kinds_and_instances(tmp_path: Path) -> None:
    path = tmp_path / "data.noun"
    path.write_text(DATA_NOUN)
    assert read_nouns(path) == {
        "n00001740": Noun("entity", (), ()),
        "n00001930": Noun("physical entity", ("n00001740",), ()),
        "n09450163": Noun("sun", (), ("n09444100",)),
    }


def test_a_missing_source_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["derive", "--wordnet", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/data.noun: No such file or directory: give the folder that holds it\n"
    )


def test_timm_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="timm: not installed"):
        derive_label_spaces.timm_lists()
