"""The report of a bank in a real browser: nothing hostile runs, filters work, and it fits the window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from feature_bank.bank import Bank
from feature_bank.report import write_report
from feature_bank.taxonomy import load_taxonomy
from tests.browser import Tab, open_browser, open_tab
from tests.feature_bank.rich_bank import HOSTILE, write_rich_bank

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    with open_tab(browser) as tab:
        yield tab


def choose(tab: Tab, **values: str) -> list[str]:
    """Set fields as a person does, wait for the page to follow, and return the ids of the cards that are shown."""
    for name, value in values.items():
        field = tab.page.locator(f"#filters [name={name}]")
        if field.evaluate("(field) => field.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
    tab.page.wait_for_timeout(300)
    return shown(tab)


def shown(tab: Tab) -> list[str]:
    found: list[str] = tab.page.evaluate(SHOWN)
    return found


def test_nothing_hostile_runs_and_nothing_is_fetched(tab: Tab, url: str, bank: Bank) -> None:
    tab.goto(url)
    page = tab.page
    assert page.title() == f"{bank.version}: feature bank"
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    assert tab.complaints == []
    # Even what did get in would not run; some browsers complain when it gets in, some when it is clicked
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=in onclick=\"document.title=1\">x</p>')")
    page.evaluate("document.getElementById('in').click()")
    assert page.title() == f"{bank.version}: feature bank"
    page.wait_for_timeout(100)  # what it says comes a moment later
    assert any("ContentSecurityPolicy" in complaint or "Content Security" in complaint for complaint in tab.complaints)
    assert {request for request in tab.requests if request.startswith(("http", "ws", "ftp"))} == set()
    assert {request for request in tab.requests if request.startswith("file")} == {url}


def test_filters_show_what_they_name(tab: Tab, url: str, bank: Bank) -> None:
    tab.goto(url)
    every = [feature.id for feature in bank.features]
    assert shown(tab) == every
    violent = [f.id for f in bank.features if "violence" in f.domains]
    assert choose(tab, domain="violence") == violent
    upper = [f.id for f in bank.features if "violence" in f.domains and f.layer == 22]
    assert choose(tab, layer="22") == upper
    assert tab.page.evaluate("location.hash") == "#domain=violence&layer=22"
    assert tab.page.evaluate("document.getElementById('count').textContent") == f"{len(upper)} of {len(every)}"
    assert choose(tab, domain="", layer="", status="refused") == [f.id for f in bank.features if not f.admitted]
    assert choose(tab, status="", kind="lexical") == [f.id for f in bank.features if f.kind == "lexical"]
    assert choose(tab, kind="", q=bank.features[4].id) == [bank.features[4].id]
    assert choose(tab, q="no such words anywhere") == []
    assert tab.page.evaluate("document.getElementById('nothing').hidden") is False
    tab.page.locator("#filters button").click()
    assert choose(tab) == every
    by_auroc = sorted(bank.features, key=lambda f: -max(round(f.scores[f"auroc_{d}"], 4) for d in f.domains))
    assert choose(tab, sort="auroc") == [f.id for f in by_auroc]
    assert tab.complaints == []


def test_an_address_brings_back_a_view_and_a_link_is_never_filtered_away(tab: Tab, url: str, bank: Bank) -> None:
    tab.goto(f"{url}#domain=terror&kind=conceptual&sort=nonsense")
    assert shown(tab) == [f.id for f in bank.features if "terror" in f.domains and f.kind == "conceptual"]
    hidden = next(f.id for f in bank.features if "terror" not in f.domains)
    tab.page.evaluate("(id) => { location.hash = `#${id}`; }", hidden)
    assert hidden in choose(tab)
    top = tab.page.evaluate("(id) => document.getElementById(id).getBoundingClientRect().top", hidden)
    assert -5 <= top < tab.page.evaluate("innerHeight")
    assert tab.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 1000, 400])
def test_it_fits_the_window_and_can_be_read(
    scheme: Any, width: int, browser: Browser, url: str, tmp_path: Path
) -> None:
    with open_tab(browser, viewport={"width": width, "height": 900}, color_scheme=scheme) as tab:
        tab.goto(url)
        run = tab.page.evaluate
        run("document.getElementById('features').scrollIntoView()")
        assert run("document.documentElement.scrollWidth") <= width
        halves = "[...document.querySelectorAll('.halves > div')].slice(0, 8)"
        assert (
            run(f"{halves}.filter((half) => half.scrollWidth > half.clientWidth).map((half) => half.innerText)") == []
        )
        lightness = "((m) => m[0] * .3 + m[1] * .6 + m[2] * .1)(getComputedStyle(%s).%s.match(/\\d+/g).map(Number))"
        back = run(lightness % ("document.body", "backgroundColor"))
        ink = run(lightness % ("document.body", "color"))
        assert (back > 200 > 60 > ink) if scheme == "light" else (back < 60 < 200 < ink)
        tab.page.screenshot(path=tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        assert tab.complaints == []


def test_all_is_there_without_scripts(browser: Browser, url: str, bank: Bank) -> None:
    with open_tab(browser, java_script_enabled=False) as tab:
        tab.goto(url)
        found = [node.get_attribute("id") for node in tab.page.locator("[hidden]").all()]
        assert tab.page.locator("article").count() == len(bank.features)
    assert sorted(filter(None, found)) == ["filters", "nothing"]  # which are of no use then
