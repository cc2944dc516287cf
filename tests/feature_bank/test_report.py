"""The report of a bank: it holds everything, asks for nothing, and nothing that it quotes can act."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from feature_bank.bank import Bank, shipped_bank_path
from feature_bank.errors import BankError, DataError
from feature_bank.report import render_report, write_report
from feature_bank.report.cards import split_runs
from feature_bank.report.charts import AUROC, bars_path, compare, strip
from feature_bank.report.overview import failed_rules
from feature_bank.report.reviews import ReviewLine, in_force
from feature_bank.report.selection import Selection, draw_selection, read_selection
from feature_bank.report.text import visible, visible_token
from feature_bank.schema import Evidence, FeatureRecord
from feature_bank.taxonomy import DOMAINS, Taxonomy, load_taxonomy
from tests.feature_bank.rich_bank import HOSTILE, write_rich_bank

SAES = [
    {
        "name": f"{layer}-{l0}",
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "l0": l0,
        "i_cdf": 0.03,
        "i_cdf_margin": 0.02,
    }
    for layer in (6, 14, 22)
    for l0 in (16, 32, 64)
]


class Reader(HTMLParser):
    """Elements with their attributes, and the text between the tags."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: dict[str, str] = {}
        self.comments: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        last = self.elements[-1][0] if self.elements else ""
        if last in ("script", "style") and last not in self.raw:
            self.raw[last] = data
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, taxonomy: Taxonomy) -> Path:
    path = tmp_path_factory.mktemp("rich") / "bank"
    write_rich_bank(path, taxonomy, features=2 * len(HOSTILE))
    return path


@pytest.fixture(scope="module")
def bank(folder: Path) -> Bank:
    return Bank.load(folder)


@pytest.fixture(scope="module")
def page(bank: Bank, taxonomy: Taxonomy) -> str:
    first = bank.features[0].id
    reviews = {
        first: tuple(
            ReviewLine(verdict="reject", reviewer=text, time=text, reason=text, concepts=(text,), explanation=text)
            for text in HOSTILE
        )
    }
    selection = Selection.model_validate(
        {
            "saes": [*SAES, {**SAES[0], "name": HOSTILE[0], "hook_name": HOSTILE[4]}],
            "choice": {"overall": HOSTILE[0], "why": [HOSTILE[1]]},
        }
    )
    return render_report(bank, taxonomy=taxonomy, reviews=reviews, selection=selection)


@pytest.fixture(scope="module")
def reader(page: str) -> Reader:
    return Reader(page)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory, taxonomy: Taxonomy) -> Reader:
    bank = write_rich_bank(
        tmp_path_factory.mktemp("plain") / "bank", taxonomy, features=2 * len(HOSTILE), hostile=False
    )
    line = ReviewLine(verdict="reject", reviewer="a", time="t", reason="b", concepts=("c",), explanation="e")
    reviews = {bank.features[0].id: (line,)}
    selection = Selection.model_validate(
        {
            "saes": [*SAES, {**SAES[0], "name": "new", "hook_name": "h"}],
            "choice": {"overall": "new", "why": ["it is best"]},
        }
    )
    return Reader(render_report(bank, taxonomy=taxonomy, reviews=reviews, selection=selection))


def shapes(reader: Reader) -> set[tuple[str, frozenset[str]]]:
    """Every element with the names of its attributes."""
    return {(tag, frozenset(attributes)) for tag, attributes in reader.elements}


def test_no_element_and_no_attribute_comes_from_what_a_bank_says(reader: Reader, harmless: Reader) -> None:
    extra = shapes(reader) - shapes(harmless)
    assert extra <= {("p", frozenset({"class"}))}  # ours, where an excerpt lacks its peak
    assert {tag for tag, _ in reader.elements} == {tag for tag, _ in harmless.elements}
    assert [name for _, attributes in reader.elements for name in attributes if name.startswith("on")] == []
    assert reader.comments == harmless.comments == []
    for tag in ("script", "style", "form", "title", "meta", "link", "img"):
        assert len(list(reader.named(tag))) == len(list(harmless.named(tag)))


def test_every_hostile_text_is_there_to_be_read(reader: Reader) -> None:
    text = "".join(reader.text)
    for hostile in HOSTILE:
        assert visible(hostile) in text


def test_the_page_asks_for_nothing(reader: Reader, page: str) -> None:
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href", "formaction", "ping"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,")
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|EventSource|import\(", reader.raw["script"])


def test_the_policy_allows_the_pages_own_script_and_style_alone(reader: Reader) -> None:
    (policy,) = [
        attributes["content"]
        for attributes in reader.named("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(reader.raw[name].encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert not any("style" in attributes for _, attributes in reader.elements)


def test_the_policy_comes_before_all_that_it_governs(page: str) -> None:
    assert page.index("Content-Security-Policy") < min(page.index(tag) for tag in ("<title", "<style", "<link"))


def test_every_feature_has_one_card(reader: Reader, bank: Bank) -> None:
    cards = list(reader.named("article"))
    assert [card["id"] for card in cards] == [feature.id for feature in bank.features]
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_every_link_and_label_leads_somewhere(reader: Reader, bank: Bank) -> None:
    ids = {attributes.get("id") for _, attributes in reader.elements}
    for attributes in reader.named("a"):
        target = (attributes["href"] or "")[1:]
        assert target in ids or "=" in target
    for _, attributes in reader.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids


def test_the_same_bank_gives_the_same_page(folder: Path, tmp_path: Path) -> None:
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for path in pages:
        write_report(folder, path)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_record_without_the_newer_fields_still_has_its_card(taxonomy: Taxonomy) -> None:
    bank = Bank.load(shipped_bank_path())
    few = bank.features[:3]
    old = {
        name: getattr(few[0], name) for name in ("id", "hook_name", "layer", "index", "threshold", "scale", "density")
    }
    bare = [FeatureRecord(**{**old, "id": f.id, "domains": [], "explanation": ""}) for f in few]
    for features in (few, bare):
        small = Bank(
            manifest=bank.manifest.model_copy(update={"quality": {}, "corpus": []}),
            features=tuple(features),
            heads={},
            pooling=bank.pooling,
            rows={},
            content_hash=bank.content_hash,
        )
        text = render_report(small, taxonomy=taxonomy)
        assert len(list(Reader(text).named("article"))) == 3
        assert not re.search(r">\s*(None|nan|Undefined)\s*<", text)


def test_the_page_of_a_large_bank_stays_small(tmp_path: Path, taxonomy: Taxonomy) -> None:
    n = 60
    bank = write_rich_bank(tmp_path / "bank", taxonomy, features=n, hostile=False)
    cards = render_report(bank, taxonomy=taxonomy).partition("<article")[2]
    assert len(cards.encode()) / n < 6_400  # 900 features and all else fit in 6 MB


def test_an_excerpt_is_cut_at_its_tokens_and_loses_nothing() -> None:
    evidence = Evidence(
        text="a b c d", peak=" c", activation=2.0, tokens=["a", " b", " c", " d"], activations=[0, 0.01, 2.0, 0]
    )
    runs = split_runs(evidence)
    assert [(run.text, run.level) for run in runs] == [("a", 0), (" b", 1), (" c", 5), (" d", 0)]
    merged = split_runs(evidence.model_copy(update={"activations": [0.0, 0.0, 0.0, 0.2]}))
    assert [(run.text, run.level) for run in merged] == [("a b c", 0), (" d", 1)]


@pytest.mark.parametrize(
    ("peak", "shown"),
    [
        pytest.param(" cat", " cat", id="once"),
        pytest.param("the", None, id="twice, so nobody knows which"),
        pytest.param("dog", None, id="nowhere"),
        pytest.param("", None, id="unknown"),
    ],
)
def test_without_tokens_the_peak_is_marked_where_it_is_certain(peak: str, shown: str | None) -> None:
    text = "the cat saw the bird"
    runs = split_runs(Evidence(text=text, peak=peak, activation=0.7))
    assert "".join(run.text for run in runs) == text
    assert next((run.text for run in runs if run.level), None) == shown


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\x00\x1b[0m\x7f\x85\ud800\u202eb\n\tc") == "a␀␛[0m␡���b\n\tc"
    assert visible_token(" word\n") == "␣word↵"
    assert visible_token("  ") == "␣␣"
    assert visible_token("two words") == "two words"
    visible("\ud800").encode()


def test_bars_fill_the_height_and_a_lone_count_is_still_seen() -> None:
    assert bars_path([]) == bars_path([0, 0]) == ""
    assert bars_path([0, 2, 4]).startswith("M0 40V40h33.3333V20h33.3333V0")
    assert "V39h" in bars_path([1, 100_000])


def test_a_strip_keeps_within_its_axis() -> None:
    line = strip(AUROC, 1.4, low=-0.5, high=2.0, null=0.52, zero=0.5)
    assert (line.at, line.low, line.width, line.null, line.zero) == (100, 0, 100, 36, 33)
    assert strip(AUROC, 0.5, low=0.4).low is None


def test_values_and_nulls_share_an_axis() -> None:
    found = compare("x", [0.9] * 4, [0.5, 0.6], axis=AUROC, above=4, ticks=(0, 1))
    assert (found.n, found.median, found.null_median, found.above) == (4, 0.9, 0.55, 4)
    assert "V0h" in found.bars
    assert "V0h" in found.null_bars


def test_rules_are_counted_by_what_stands_before_the_colon(bank: Bank) -> None:
    features = [
        bank.features[0].model_copy(update={"refusals": refusals})
        for refusals in (["fidelity: 0.1"], ["fidelity: 0.2", "detection"], [])
    ]
    found = [(rule.text, rule.fails, rule.alone) for rule in failed_rules(features)]
    assert found == [("fidelity", 2, 1), ("detection", 1, 0)]


def test_reviews_stand_on_the_card_and_the_last_verdict_in_its_status(reader: Reader, bank: Bank) -> None:
    status = {card["id"]: card["data-status"] for card in reader.named("article")}
    assert status[bank.features[0].id] == "admitted rejected"
    assert status[bank.features[1].id] == "admitted unreviewed"


def test_a_selection_is_drawn_with_a_line_for_each_hook_point(tmp_path: Path) -> None:
    record: dict[str, Any] = {"saes": SAES, "choice": {"overall": "14-32", "by_hook_point": {"h": "6-16"}}, "other": 1}
    (tmp_path / "selection.json").write_text(json.dumps(record))
    (plot,) = draw_selection(read_selection(tmp_path))
    assert [len(series.marks) for series in plot.series] == [3, 3, 3]
    assert [mark.name for series in plot.series for mark in series.marks if mark.chosen] == ["6-16", "14-32"]
    heights = [series.label_y for series in plot.series]
    assert min(b - a for a, b in pairwise(heights)) >= 18  # labels keep apart
    alone = {**SAES[0], "i_cdf": 0.0, "i_cdf_margin": None, "separation": -0.01}
    plots = draw_selection(Selection.model_validate({"saes": [alone]}))
    assert [found.title for found in plots] == ["Separation over its null", "I CDF"]
    assert plots[1].series[0].line == plots[1].series[0].null_line == ""
    assert all(14 <= mark.y <= 226 for found in plots for mark in found.series[0].marks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "not found", id="missing"),
        pytest.param("{", "not valid JSON", id="half"),
        pytest.param("[]", "field 'file'", id="no object"),
        pytest.param('{"saes": []}', "field 'saes'", id="empty"),
        pytest.param('{"saes": [{"name": "a", "hook_name": "h", "l0": -1, "i_cdf": 0}]}', "saes.0.l0", id="l0"),
        pytest.param(json.dumps({"saes": SAES, "choice": {"overall": "other"}}), "'other'", id="unknown choice"),
    ],
)
def test_a_bad_selection_names_file_and_field(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "selection.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_selection(tmp_path)
    assert "selection.json" in str(caught.value)


def test_a_report_is_not_replaced_unasked_and_a_failure_leaves_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert write_report(folder, out).size == out.stat().st_size
    out.write_text("mine")
    with pytest.raises(DataError, match="--overwrite"):
        write_report(folder, out)
    with pytest.raises(BankError, match="no bank"):
        write_report(tmp_path, out, overwrite=True)
    assert out.read_text() == "mine"
    write_report(folder, out, overwrite=True)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    with pytest.raises(DataError, match="a folder"):
        write_report(folder, tmp_path, overwrite=True)
    with pytest.raises(DataError, match="cannot be written"):
        write_report(folder, out / "below.html")


def test_every_domain_has_its_colour(page: str) -> None:
    for domain in DOMAINS:
        assert f".d-{domain}" in page


def test_a_review_puts_its_labels_in_the_place_of_the_machines(bank: Bank) -> None:
    record = bank.features[0]
    first = ReviewLine(verdict="relabel", reviewer="a", time="1", domains=("politics",), explanation="votes")
    second = ReviewLine(verdict="relabel", reviewer="a", time="2", concepts=())
    label = in_force(record, [first, second])
    assert (label.domains, label.concepts, label.explanation) == (["politics"], [], "votes")
    assert in_force(record, [ReviewLine(verdict="note", reviewer="a", time="3")]) is record
