"""The checker passes the shipped taxonomy and finds every kind of shortcut and gap."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from feature_bank.taxonomy import Concept, DomainTaxonomy, Pair, load_taxonomy
from service.cli import build_app
from training.taxonomy_checks import findings, shortcuts

NOUNS = (
    "ship",
    "tower",
    "garden",
    "letter",
    "engine",
    "mirror",
    "ladder",
    "carpet",
    "window",
    "kettle",
    "basket",
    "violin",
)


def taxonomy(side: Callable[[str], tuple[str, str]], **changes: Any) -> dict[Any, DomainTaxonomy]:
    """One concept whose pairs are `side(noun)`."""
    pairs = []
    for number, noun in enumerate(NOUNS):
        positive, negative = side(noun)
        split = "test" if number % 4 == 0 else "train"
        pairs.append(Pair(positive=positive, negative=negative, lang="en", genre="news", split=split))
    concept = Concept(
        id="arson", name="Arson", definition="x" * 40, pairs=tuple(changes.pop("pairs", pairs)), hard_negatives=()
    )
    subtopic = {"id": "fire", "name": "Fire", "definition": "y" * 40, "concepts": [concept]}
    return {"violence": DomainTaxonomy.model_validate({"domain": "violence", "subtopics": [subtopic]})}


def test_the_shipped_taxonomy_has_no_gap_and_no_shortcut() -> None:
    shipped = load_taxonomy()
    assert findings(shipped) == []
    measured = shortcuts(shipped)
    assert {(s.domain, s.lang) for s in measured} == {(d, lang) for d in shipped for lang in ("en", "zh")}
    assert [line for shortcut in measured for line in shortcut.findings] == []


def test_sides_that_differ_in_content_alone_are_not_told_apart() -> None:
    (found,) = shortcuts(taxonomy(lambda noun: (f"They burnt the {noun}.", f"They moved the {noun}.")))
    assert found.length_auroc == 0.5
    assert found.findings == []


def test_length_gives_itself_away_whichever_side_is_the_longer() -> None:
    for side in (
        lambda noun: (f"They burnt the {noun} with great care.", f"They moved the {noun}."),
        lambda noun: (f"They burnt the {noun}.", f"They moved the {noun} with great care."),
    ):
        (found,) = shortcuts(taxonomy(side))
        assert found.length_auroc > 0.9
        assert "length tells the sides apart" in found.findings[0]


def test_function_words_give_themselves_away() -> None:
    (found,) = shortcuts(taxonomy(lambda noun: (f"You burnt your {noun}.", f"They sold the {noun}.")))
    assert found.function_words_auroc > 0.9
    assert "function words" in found.findings[-1]


def test_every_gap_is_named() -> None:
    pair = Pair(positive="They burnt it.", negative="Nobody saw a mountain.", lang="en", genre="news", split="train")
    found = "\n".join(findings(taxonomy(lambda noun: (noun, noun), pairs=[pair])))
    for line in (
        "violence: 1 subtopics, expected 4 to 6",
        "violence: 1 concepts, expected 25",
        "violence/arson: 1 pairs in English, expected 8",
        "violence/arson: no pair in en of the split 'test'",
        "violence/arson: 0 hard negatives",
        "violence/arson: pair 0: its sides share 0% of their words",
        "violence: 0 concepts with 4 pairs in Chinese",
    ):
        assert line in found


def test_the_command_shows_the_table_and_exits_with_1_where_something_was_found(tmp_path: Path) -> None:
    whole = CliRunner().invoke(build_app(), ["taxonomy", "check"])
    assert whole.exit_code == 0, whole.output
    assert "nothing to complain of" in whole.stdout
    record = taxonomy(lambda noun: (f"They burnt the {noun}.", f"They moved the {noun}."))["violence"]
    (tmp_path / "violence.yaml").write_text(yaml.safe_dump(record.model_dump(mode="json", by_alias=True)))
    short = CliRunner().invoke(build_app(), ["taxonomy", "check", str(tmp_path), "--json"])
    assert short.exit_code == 1
    assert any("expected 25" in line for line in json.loads(short.stdout)["findings"])


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_lists_every_concept(as_json: bool) -> None:
    result = CliRunner().invoke(build_app(), ["taxonomy", "list", *(["--json"] if as_json else [])])
    assert result.exit_code == 0
    for record in load_taxonomy().values():
        for concept in record.concepts:
            assert concept.id[:12] in result.stdout
    if as_json:
        assert {"domain", "subtopic", "concept", "pairs"} <= json.loads(result.stdout)[0].keys()


def test_a_missing_folder_is_one_line() -> None:
    result = CliRunner().invoke(build_app(), ["taxonomy", "check", "/nowhere"])
    assert result.exit_code == 2
    assert "holds no taxonomy" in result.stderr
