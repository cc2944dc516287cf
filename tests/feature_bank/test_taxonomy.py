"""Taxonomy files: the shipped ones are whole, and a file of the wrong form is refused by name and field."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from feature_bank.errors import DataError
from feature_bank.taxonomy import DOMAINS, Taxonomy, load_taxonomy, normalised

PAIR = {"with": "The ship was burnt.", "without": "The ship was sold.", "lang": "en", "genre": "news", "split": "train"}


@pytest.fixture(scope="module")
def shipped() -> Taxonomy:
    return load_taxonomy()


def concept(name: str = "arson", **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "name": "A concept",
        "definition": "A sentence that says what counts and what does not count.",
        "pairs": [PAIR],
        "hard_negatives": [{"text": "The toast was burnt.", "lang": "en", "kind": "everyday"}],
    } | changes


def write(folder: Path, *concepts: dict[str, Any], domain: str = "violence", file: str = "violence.yaml") -> Path:
    subtopic = {"id": "fire", "name": "Fire", "definition": "What is set on fire, and what is not, in one sentence."}
    data = {"domain": domain, "subtopics": [subtopic | {"concepts": list(concepts)}]}
    (folder / file).write_text(yaml.safe_dump(data), encoding="utf-8")
    return folder


def test_every_domain_ships_enough_concepts_and_pairs(shipped: Taxonomy) -> None:
    assert tuple(shipped) == DOMAINS
    for record in shipped.values():
        assert 4 <= len(record.subtopics) <= 6
        assert len(record.concepts) >= 25
        chinese = 0
        for each in record.concepts:
            languages = Counter(pair.lang for pair in each.pairs)
            assert languages["en"] >= 8
            chinese += languages["zh"] >= 4
            assert {pair.split for pair in each.pairs} == {"train", "test"}
            assert len(each.hard_negatives) >= 3
        assert chinese >= 10


def test_nothing_in_the_adult_domain_speaks_of_minors(shipped: Taxonomy) -> None:
    forbidden = re.compile(
        r"\b(child|children|kid|kids|minors?|teen\w*|young\w*|girls?|boys?|school\w*|student\w*|pupil\w*|underage|"
        r"youth\w*|daughters?|sons?|juvenile\w*)\b|未成年|少女|少年|孩|学生|学校|幼",
        re.IGNORECASE,
    )
    for each in shipped["pornography"].concepts:
        for text in (each.name, each.definition, *each.texts()):
            assert not forbidden.search(text), text


def test_case_width_and_punctuation_make_no_new_text() -> None:
    assert normalised("Ｔhe ship, burnt!") == normalised("the SHIP burnt")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"id": "Arson"}, "subtopics.0.concepts.0.id"),
        ({"definition": "short"}, "subtopics.0.concepts.0.definition"),
        ({"pairs": []}, "subtopics.0.concepts.0.pairs"),
        ({"pairs": [PAIR | {"with": "two\nlines"}]}, "pairs.0.with"),
        ({"pairs": [{k: v for k, v in PAIR.items() if k != "without"}]}, "pairs.0.without"),
        ({"pairs": [PAIR | {"split": "dev"}]}, "pairs.0.split"),
        ({"pairs": [PAIR | {"without": PAIR["with"]}]}, "occurs twice"),
        ({"hard_negatives": [{"text": "THE SHIP WAS SOLD", "lang": "en", "kind": "idiom"}]}, "occurs twice"),
        ({"note": "x"}, "concepts.0.note"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    write(tmp_path, concept(**changes))
    with pytest.raises(DataError, match=re.escape(complaint)) as error:
        load_taxonomy(tmp_path)
    assert "violence" in str(error.value)


def test_an_id_or_a_text_stands_in_one_place_only(tmp_path: Path) -> None:
    write(tmp_path, concept(), concept(pairs=[PAIR | {"with": "A fire.", "without": "A tree."}], hard_negatives=[]))
    with pytest.raises(DataError, match="'arson' occurs 2 times"):
        load_taxonomy(tmp_path)
    write(tmp_path, concept())
    write(tmp_path, concept("other"), domain="terror", file="terror.yaml")
    with pytest.raises(DataError, match=r"terror/other: .*first in violence/arson"):
        load_taxonomy(tmp_path)


def test_a_folder_without_files_and_a_file_that_is_no_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no taxonomy"):
        load_taxonomy(tmp_path)
    write(tmp_path, concept(), domain="terror")
    with pytest.raises(DataError, match="field 'domain'"):
        load_taxonomy(tmp_path)
    (tmp_path / "violence.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(DataError, match=r"violence\.yaml: not YAML"):
        load_taxonomy(tmp_path)
    (tmp_path / "violence.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"violence\.yaml: not YAML"):
        load_taxonomy(tmp_path)
