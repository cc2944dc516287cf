"""Takes the pictures of the page: a server around the embedded model, a little traffic, and a browser.

Run it as scripts/screenshots [FOLDER]; without a folder the pictures go to docs/images.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from PIL import Image
from playwright.sync_api import expect

from tests.browser import find_browser, open_browser, open_tab

if TYPE_CHECKING:
    from playwright.sync_api import Page

PROJECT = Path(__file__).resolve().parents[1]
SIZE = {"width": 1440, "height": 900}
PATIENCE = 120.0  # seconds
KEY = "key-of-the-pictures"
SIGN_IN = f"if (location.protocol === 'http:') sessionStorage.setItem('sailguard-key', {KEY!r})"
QUESTION = "Who won the general election of 1945 in the United Kingdom, and which party formed the government?"
LIBRARY = "How should a school library be organised?"
TEXTS = (
    "A kettle of water boils faster with its lid on.",
    "The parliament voted on the election law, and the president signed it after a debate between the parties.",
    "Bees dance in the hive to tell where flowers are.",
    "The siege of the town lasted for months, and thousands of soldiers were killed in the battle.",
    "The bombing of the embassy was claimed by a militant group, and the attack killed several people.",
    "The minister of finance resigned, and the opposition called for a vote of no confidence.",
    "A glacier moves a few metres a year, and grinds the rock under it to flour.",
    "Voters of the province elected a new governor, who had campaigned on the reform of taxes.",
    "The museum shows maps of the harbour from five centuries.",
    "Two armies met at the river in the autumn, and neither held the bridge at the end of the day.",
)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server on a free port with the shipped bank, which keeps its audit in `folder`."""
    settings = {
        "SAILGUARD_AUDIT_TEXT": "true",
        "SAILGUARD_ADMIN_KEYS": KEY,
        "SAILGUARD_BANK": "shipped",
        "HF_HUB_OFFLINE": "1",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SAILGUARD_")}
    command = [Path(sys.executable).parent / "sailguard", "serve", "--port", "0", "--audit", folder / "audit.sqlite"]
    with (folder / "server.log").open("w+b") as log:
        process = subprocess.Popen(command, env=kept | settings, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield _address(process, folder / "server.log")
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """What the server says that it listens on, once it is ready."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        said = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"http://127\.0\.0\.1:\d+", said):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{found[0]}/readyz").status_code == 200:
                    return found[0]
        time.sleep(0.2)
    raise SystemExit(f"screenshots: the server did not get ready:\n{log.read_text(errors='replace')[-2000:]}")


def traffic(url: str) -> None:
    """A little of everything, so that the monitor has something to show."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as client:
        model = client.get("/v1/about").raise_for_status().json()["model"]
        for text in (*TEXTS, *TEXTS[1::2]):
            client.post("/v1/moderations", json={"input": text}).raise_for_status()
        for question in (QUESTION, LIBRARY):
            message = {"role": "user", "content": question}
            body = {"model": model, "messages": [message], "max_tokens": 24, "seed": 1}
            client.post("/v1/chat/completions", json=body).raise_for_status()


def playground(page: Page) -> None:
    """An answer to a question, with a token chosen and its strongest feature pinned."""
    chat(page, QUESTION, max_tokens=60)
    tokens = page.locator(".tok[data-phase=prompt]")
    tokens.filter(has_text="election").first.click()
    page.locator("#pg-token tr[data-feature]").first.get_by_role("button", name="Pin").click()


def steering(page: Page) -> None:
    """An answer about a library, and what becomes of it while the features of a domain are held up."""
    page.get_by_role("tab", name="Steering").click()
    page.get_by_role("combobox", name="Add a target").fill("politics")
    page.locator("#pg-steering").get_by_role("option", name="politics").first.click()
    page.locator(".pg-target[data-target=politics]").get_by_role("slider").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    page.get_by_role("checkbox", name="Compare").set_checked(True)
    chat(page, LIBRARY, max_tokens=50)
    page.locator(".pg-flow").first.scroll_into_view_if_needed()


def explorer(page: Page) -> None:
    """What a search finds, and the card of the first."""
    page.get_by_role("searchbox", name="Search").fill("election")
    page.wait_for_timeout(800)
    page.locator("[role=option][data-feature]").first.click()
    page.locator("article[data-card] figure.excerpt").first.wait_for()


def monitor(page: Page) -> None:
    """The verdicts of the last minutes, the newest opened."""
    page.locator(".stream-state[data-state=live]").wait_for()
    page.locator("ol.events > li[data-action] button.event").first.click()
    expect(page.locator("[data-tile=judged]")).not_to_contain_text("…")  # rates take two looks at the counters


def compare(page: Page) -> None:
    """The texts under two policies."""
    page.locator("[data-side=left]").get_by_role("combobox", name="Policy").select_option("balanced")
    page.locator("[data-side=right]").get_by_role("combobox", name="Policy").select_option("strict")
    page.get_by_role("textbox", name="Texts", exact=True).fill("\n".join(TEXTS))
    page.locator("button[data-act=compare]").click()
    page.locator("tr.text-row").nth(len(TEXTS) - 1).wait_for()
    page.get_by_role("region", name="Comparison").evaluate("(one) => scrollTo(0, one.offsetTop - 72)")


def chat(page: Page, question: str, *, max_tokens: int) -> None:
    """Send a message and wait for the end of the answer."""
    page.get_by_role("button", name="Settings", exact=True).click()
    for name, value in (("Max tokens", max_tokens), ("Seed", 7)):
        page.locator("#pg-settings").get_by_role("spinbutton", name=name).fill(str(value))
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_role("textbox", name="Message", exact=True).fill(question)
    page.get_by_role("button", name="Send", exact=True).click()
    page.locator("section.pg-turn[data-state=done]").last.wait_for()


def save(picture: bytes, place: Path) -> None:
    """Write a picture with 256 colours, chosen so that none is far from what it was: it takes a third of the room."""
    with Image.open(io.BytesIO(picture)) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(place, optimize=True)


PICTURES: dict[str, tuple[str, str, Callable[[Page], None]]] = {
    "playground": ("playground", "light", playground),
    "playground-dark": ("playground", "dark", playground),
    "steering": ("playground", "light", steering),
    "explorer": ("explorer", "light", explorer),
    "monitor": ("monitor", "light", monitor),
    "compare": ("compare", "light", compare),
}


def main(arguments: list[str]) -> None:
    """Take all pictures."""
    if find_browser() is None:
        raise SystemExit("screenshots: there is no browser; install chromium")
    out = Path(arguments[0]) if arguments else PROJECT / "docs" / "images"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url, open_browser() as browser:
        traffic(url)
        for name, (view, scheme, prepare) in PICTURES.items():
            # Playwright hides the caret with a style of its own, which the page's policy would refuse
            options: dict[str, Any] = {"viewport": SIZE, "color_scheme": scheme, "locale": "en-GB", "bypass_csp": True}
            with open_tab(browser, **options, reduced_motion="reduce") as tab:
                page = tab.page
                page.set_default_timeout(1000 * PATIENCE)
                page.add_init_script(SIGN_IN)
                tab.goto(f"{url}/#/{view}")
                page.locator(f"main .view-{view}").wait_for()
                prepare(page)
                page.mouse.move(0, 0)
                page.wait_for_timeout(1000)  # what comes a moment later: charts, cards
                place = out / f"{name}.png"
                save(page.screenshot(animations="disabled"), place)
                sys.stdout.write(f"{place}: {place.stat().st_size // 1000} kB\n")
                for line in tab.complaints:
                    sys.stderr.write(f"screenshots: {name}: {line}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
