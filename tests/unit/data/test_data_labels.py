import importlib.util
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.data.labels import (
    LABEL_SPACES,
    LABEL_SPACES_FOLDER,
    Hierarchy,
    build_hierarchy,
    class_name,
    label_map,
    load_label_space,
)
from vitscale.errors import ConfigError

TIMM_LISTS = Path(importlib.util.find_spec("timm").origin).parent / "data" / "_info"
PERSON = "n00007846"
SIZES = {
    "in21k_google": 21_843,
    "in22k_ms": 21_842,
    "in21k_fall11": 21_841,
    "in21k_winter21": 19_167,
    "in12k": 11_821,
    "in21k_p_fall11": 11_221,
    "in21k_p_winter21": 10_450,
    "in1k": 1_000,
}
TIMM_NAMES = {
    "in21k_google": "imagenet21k_goog_synsets.txt",
    "in22k_ms": "imagenet22k_ms_synsets.txt",
    "in21k_fall11": "imagenet22k_synsets.txt",
    "in12k": "imagenet12k_synsets.txt",
    "in21k_p_fall11": "imagenet21k_miil_synsets.txt",
    "in21k_p_winter21": "imagenet21k_miil_w21_synsets.txt",
    "in1k": "imagenet_synsets.txt",
}


def wnids_of(name: str) -> tuple[str, ...]:
    return load_label_space(name).wnids


def wordnet_graph() -> nx.DiGraph:
    """Edges go from the more general synset to the special one."""
    graph = nx.DiGraph()
    for line in (LABEL_SPACES_FOLDER / "wordnet.tsv").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            wnid, parents, _ = line.split("\t")
            graph.add_edges_from((parent, wnid) for parent in parents.split())
    return graph


WORDNET = wordnet_graph()
FALL11 = wnids_of("in21k_fall11")


@st.composite
def related_classes(draw: st.DrawFn, max_seeds: int = 12) -> tuple[str, ...]:
    """A few classes and some of what is above them, so that there is an order among them, in any sequence."""
    seeds = draw(st.lists(st.sampled_from(FALL11), min_size=1, max_size=max_seeds))
    pool = sorted(set(seeds).union(*(nx.ancestors(WORDNET, seed) for seed in seeds)))
    return tuple(draw(st.lists(st.sampled_from(pool), min_size=1, unique=True)))


some_classes = st.lists(st.sampled_from(FALL11[:40]), unique=True)


def test_the_names_are_those_of_the_files() -> None:
    assert {f"{name}.txt" for name in LABEL_SPACES} | {"wordnet.tsv", "WORDNET_LICENSE.txt"} == {
        path.name for path in LABEL_SPACES_FOLDER.iterdir()
    }
    assert set(LABEL_SPACES) == set(SIZES)


@pytest.mark.parametrize("name", LABEL_SPACES)
def test_a_label_space_has_its_size_and_says_where_it_is_from(name: str) -> None:
    space = load_label_space(name)
    assert space.name == name
    assert len(space.wnids) == len(set(space.wnids)) == SIZES[name]
    assert "Classes of" in space.derivation
    assert "From timm's" in space.derivation or "Derived from" in space.derivation
    assert "#" not in space.derivation


@pytest.mark.parametrize("name", sorted(TIMM_NAMES))
def test_labels_are_timms(name: str) -> None:
    assert wnids_of(name) == tuple((TIMM_LISTS / TIMM_NAMES[name]).read_text().split())


@pytest.mark.parametrize("name", sorted(set(LABEL_SPACES) - {"in22k_ms"}))
def test_labels_are_sorted_wnids(name: str) -> None:
    assert list(wnids_of(name)) == sorted(wnids_of(name))


def test_winter21_is_fall11_without_most_people() -> None:
    winter21 = wnids_of("in21k_winter21")
    removed = set(FALL11) - set(winter21)
    people = nx.descendants(WORDNET, PERSON)
    assert set(winter21) < set(FALL11)
    assert len(removed) == 2_674
    assert removed < people
    assert PERSON in winter21
    # 158 kinds of people, and three persons with a name.
    assert len(set(winter21) & people) == 158 + 3


def test_winter21_agrees_with_the_subsets_others_made_of_it() -> None:
    winter21 = set(wnids_of("in21k_winter21"))
    of_winter21 = tuple(wnid for wnid in wnids_of("in21k_p_fall11") if wnid in winter21)
    assert of_winter21 == wnids_of("in21k_p_winter21")


def test_an_unknown_label_space_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match="'in21k_winter': unknown: did you mean in21k_winter21"):
        load_label_space("in21k_winter")


@given(some_classes, some_classes)
def test_a_map_gives_each_class_its_label(source: list[str], target: list[str]) -> None:
    mapped = label_map(source, target)
    assert mapped.dtype == np.int32
    assert [target[label] if label >= 0 else None for label in mapped] == [
        wnid if wnid in target else None for wnid in source
    ]


@given(some_classes, some_classes)
def test_there_and_back_is_the_identity_where_there_is_a_way(source: list[str], target: list[str]) -> None:
    there, back = label_map(source, target), label_map(target, source)
    kept = np.flatnonzero(there >= 0)
    np.testing.assert_array_equal(back[there[kept]], kept)


@given(some_classes, some_classes, some_classes)
def test_two_maps_are_one_where_the_middle_loses_nothing(a: list[str], b: list[str], extra: list[str]) -> None:
    middle = list(dict.fromkeys([*extra, *b, *a]))
    np.testing.assert_array_equal(label_map(middle, b)[label_map(a, middle)], label_map(a, b))


@pytest.mark.parametrize(
    ("source", "target", "lost"), [("in1k", "in21k_p_fall11", 9), ("in21k_google", "in1k", 20_844)]
)
def test_maps_between_published_spaces(source: str, target: str, lost: int) -> None:
    assert np.count_nonzero(label_map(wnids_of(source), wnids_of(target)) < 0) == lost


@given(related_classes(), related_classes())
def test_a_map_to_ancestors_takes_the_nearest(source: tuple[str, ...], target: tuple[str, ...]) -> None:
    for wnid, label in zip(source, label_map(source, target, to_ancestors=True), strict=True):
        steps = dict(nx.single_target_shortest_path_length(WORDNET, wnid))
        reached = [(steps[other], place) for place, other in enumerate(target) if other in steps]
        assert label == min(reached, default=(0, -1))[1]


def test_of_two_nearest_ancestors_the_first_in_label_order_is_taken() -> None:
    for wnid in FALL11:
        parents = sorted(WORDNET.predecessors(wnid))
        if len(parents) > 1:
            assert label_map([wnid], parents, to_ancestors=True).tolist() == [0]
            assert label_map([wnid], parents[::-1], to_ancestors=True).tolist() == [0]


def test_a_class_of_ones_own_has_no_ancestors() -> None:
    assert label_map(["dogs"], FALL11, to_ancestors=True).tolist() == [-1]
    assert label_map(["dogs"], ["cats", "dogs"], to_ancestors=True).tolist() == [1]


@pytest.mark.parametrize(
    "use", [lambda: label_map([], ["a", "b", "a"]), lambda: build_hierarchy([FALL11[0], FALL11[0]])]
)
def test_classes_that_are_there_twice_are_refused(use) -> None:
    with pytest.raises(ConfigError, match=f"classes: (a|{FALL11[0]}) is there twice"):
        use()


def test_a_hierarchy_of_classes_of_ones_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="classes: digit_3 is not in WordNet"):
        build_hierarchy([FALL11[0], "digit_3"])


@given(related_classes())
def test_a_hierarchy_is_what_graph_theory_makes_of_wordnet(wnids: tuple[str, ...]) -> None:
    hierarchy = build_hierarchy(wnids)
    order = nx.DiGraph()
    order.add_nodes_from(range(len(wnids)))
    order.add_edges_from(
        (above, label)
        for label, wnid in enumerate(wnids)
        for above, other in enumerate(wnids)
        if other in nx.ancestors(WORDNET, wnid)
    )
    reduced = nx.transitive_reduction(order)
    assert hierarchy.ancestors.tolist() == sorted([label, above] for above, label in order.edges)
    assert hierarchy.parents.tolist() == sorted([label, parent] for parent, label in reduced.edges)
    for level, labels in enumerate(nx.topological_generations(reduced)):
        assert np.flatnonzero(hierarchy.level == level).tolist() == sorted(labels)
    check_lines(hierarchy)


def check_lines(hierarchy: Hierarchy) -> None:
    parents = {(label, parent) for label, parent in hierarchy.parents.tolist()}
    assert hierarchy.line.shape == (len(hierarchy.wnids), hierarchy.level.max() + 1)
    for label, level in enumerate(hierarchy.level):
        line = hierarchy.line[label].tolist()
        assert line[level] == label
        assert set(line[level + 1 :]) <= {-1}
        for parent, child in pairwise(line[: level + 1]):
            assert (child, parent) in parents
            assert hierarchy.level[parent] == hierarchy.level[child] - 1
            assert parent == min(p for c, p in parents if c == child and hierarchy.level[p] == hierarchy.level[parent])


@pytest.mark.parametrize(("name", "levels", "non_leaves"), [("in21k_fall11", 14, 4_588), ("in21k_p_fall11", 12, 2_453)])
def test_the_hierarchy_of_imagenet(name: str, levels: int, non_leaves: int) -> None:
    hierarchy = build_hierarchy(wnids_of(name))
    assert hierarchy.line.shape[1] == levels
    assert len(np.unique(hierarchy.ancestors[:, 1])) == non_leaves
    assert (hierarchy.level[hierarchy.ancestors[:, 1]] < hierarchy.level[hierarchy.ancestors[:, 0]]).all()
    assert hierarchy.level.dtype == hierarchy.line.dtype == hierarchy.parents.dtype == np.int32


def test_the_number_of_ancestors_in_fall11() -> None:
    counts = np.bincount(build_hierarchy(FALL11).ancestors[:, 0], minlength=len(FALL11))
    assert counts.max() == 15
    assert counts.mean() == pytest.approx(4.66, abs=0.005)
    assert sum(WORDNET.in_degree(wnid) > 1 for wnid in FALL11) == 453


def test_flat_classes_have_one_level() -> None:
    hierarchy = build_hierarchy(wnids_of("in1k"))
    np.testing.assert_array_equal(hierarchy.line, np.arange(1000)[:, None])
    assert hierarchy.parents.shape == hierarchy.ancestors.shape == (0, 2)


def test_no_classes_have_no_levels() -> None:
    hierarchy = build_hierarchy([])
    assert hierarchy.level.shape == (0,)
    assert hierarchy.line.shape == (0, 0)


def test_names_are_the_first_of_timms() -> None:
    lines = (TIMM_LISTS / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    names = {wnid: lemmas.split(", ")[0] for wnid, lemmas in (line.split("\t") for line in lines)}
    wnids = set().union(*(wnids_of(name) for name in LABEL_SPACES))
    assert {wnid: class_name(wnid) for wnid in wnids} == {wnid: names[wnid] for wnid in wnids}


def test_two_classes_may_share_a_name() -> None:
    assert class_name("n02012849") == class_name("n03126707") == "crane"


def test_a_class_of_ones_own_is_called_what_it_is() -> None:
    assert class_name("digit_3") == "digit_3"


def test_wordnets_notice_travels_with_what_is_derived_from_it() -> None:
    notice = (LABEL_SPACES_FOLDER / "WORDNET_LICENSE.txt").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice
    assert "Permission to use, copy, modify and distribute" in notice
