"""The report of a bank in a real browser: nothing hostile runs, filters work, and it fits the window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_bank.bank import Bank
from feature_bank.report import write_report
from feature_bank.taxonomy import load_taxonomy
from tests.browser import Page, open_browser
from tests.feature_bank.rich_bank import HOSTILE, write_rich_bank

pytestmark = pytest.mark.browser

SHOWN = "[...document.querySelectorAll('article')].filter((card) => !card.hidden).map((card) => card.id)"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return write_rich_bank(tmp_path_factory.mktemp("rich") / "bank", load_taxonomy(), features=2 * len(HOSTILE))


@pytest.fixture(scope="module")
def url(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rich-again")
    write_rich_bank(folder / "bank", load_taxonomy(), features=2 * len(HOSTILE))
    out = folder / "report.html"
    write_report(folder / "bank", out)
    return out.as_uri()


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with open_browser() as page:
        yield page


def choose(tab: Page, **values: str) -> list[str]:
    """Set fields as a person does, wait for the page to follow, and return the ids of the cards that are shown."""
    for name, value in values.items():
        tab.run(
            f"(() => {{ const field = document.getElementById('filters').elements[{name!r}];"
            f" field.value = {value!r}; field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
        )
    tab.run("new Promise((done) => setTimeout(done, 300))")
    shown: list[str] = tab.run(SHOWN)
    return shown


def test_nothing_hostile_runs_and_nothing_is_fetched(tab: Page, url: str, bank: Bank) -> None:
    tab.open(url)
    assert tab.run("document.title") == f"{bank.version}: feature bank"
    assert tab.run("document.scripts.length") == 1
    assert tab.run("getComputedStyle(document.body).display") == "block"
    assert tab.complaints == []
    # Even what did get in would not run; some browsers complain when it gets in, some when it is clicked
    tab.run("document.body.insertAdjacentHTML('beforeend', '<p id=in onclick=\"document.title=1\">x</p>')")
    tab.run("document.getElementById('in').click()")
    assert tab.run("document.title") == f"{bank.version}: feature bank"
    assert any("ContentSecurityPolicy" in complaint or "Content Security" in complaint for complaint in tab.complaints)
    tab.complaints.clear()
    assert {request for request in tab.requests if request.startswith(("http", "ws", "ftp"))} == set()
    assert {request for request in tab.requests if request.startswith("file")} == {url}


def test_filters_show_what_they_name(tab: Page, url: str, bank: Bank) -> None:
    tab.open(url)
    every = [feature.id for feature in bank.features]
    assert tab.run(SHOWN) == every
    violent = [f.id for f in bank.features if "violence" in f.domains]
    assert choose(tab, domain="violence") == violent
    upper = [f.id for f in bank.features if "violence" in f.domains and f.layer == 22]
    assert choose(tab, layer="22") == upper
    assert tab.run("location.hash") == "#domain=violence&layer=22"
    assert tab.run("document.getElementById('count').textContent") == f"{len(upper)} of {len(every)}"
    assert choose(tab, domain="", layer="", status="refused") == [f.id for f in bank.features if not f.admitted]
    assert choose(tab, status="", kind="lexical") == [f.id for f in bank.features if f.kind == "lexical"]
    assert choose(tab, kind="", q=bank.features[4].id) == [bank.features[4].id]
    assert choose(tab, q="no such words anywhere") == []
    assert tab.run("document.getElementById('nothing').hidden") is False
    tab.run("document.querySelector('#filters button').click()")
    assert choose(tab) == every
    by_auroc = sorted(bank.features, key=lambda f: -max(round(f.scores[f"auroc_{d}"], 4) for d in f.domains))
    assert choose(tab, sort="auroc") == [f.id for f in by_auroc]
    assert tab.complaints == []


def test_an_address_brings_back_a_view_and_a_link_is_never_filtered_away(tab: Page, url: str, bank: Bank) -> None:
    tab.open(f"{url}#domain=terror&kind=conceptual&sort=nonsense")
    assert tab.run(SHOWN) == [f.id for f in bank.features if "terror" in f.domains and f.kind == "conceptual"]
    hidden = next(f.id for f in bank.features if "terror" not in f.domains)
    tab.run(f"location.hash = '#{hidden}'")
    shown = choose(tab)
    assert hidden in shown
    top = tab.run(f"document.getElementById('{hidden}').getBoundingClientRect().top")
    assert -5 <= top < tab.run("innerHeight")
    assert tab.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 1000, 400])
def test_it_fits_the_window_and_can_be_read(scheme: str, width: int, tab: Page, url: str, tmp_path: Path) -> None:
    tab.resize(width, 900)
    tab.prefer(scheme)
    tab.open(url)
    tab.run("document.getElementById('features').scrollIntoView()")
    assert tab.run("document.documentElement.scrollWidth") <= width
    halves = "[...document.querySelectorAll('.halves > div')].slice(0, 8)"
    assert (
        tab.run(f"{halves}.filter((half) => half.scrollWidth > half.clientWidth).map((half) => half.innerText)") == []
    )
    lightness = "((m) => m[0] * .3 + m[1] * .6 + m[2] * .1)(getComputedStyle(%s).%s.match(/\\d+/g).map(Number))"
    back = tab.run(lightness % ("document.body", "backgroundColor"))
    ink = tab.run(lightness % ("document.body", "color"))
    assert (back > 200 > 60 > ink) if scheme == "light" else (back < 60 < 200 < ink)
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert tab.complaints == []


def test_all_is_there_without_scripts(tab: Page, url: str, bank: Bank) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(url)
        nodes = tab.call("DOM.getDocument", depth=-1)["root"]
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
    found = []
    stack = [nodes]
    while stack:
        node = stack.pop()
        stack += node.get("children", [])
        attributes = node.get("attributes", [])
        if "hidden" in attributes[::2]:
            found.append(dict(zip(attributes[::2], attributes[1::2], strict=True)).get("id"))
    assert sorted(filter(None, found)) == ["filters", "nothing"]  # which are of no use then
