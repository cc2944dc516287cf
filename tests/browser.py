"""The browser that is installed, for tests: driven by Playwright, without a network but for this machine's own."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 30.0  # seconds; a busy machine is slow
SWITCHES = (
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Tab:
    """A page of a context of its own. What it says, throws, refuses or asks for is kept.

    complaints: lines of the console, exceptions, dialogs, and what a content security policy or Trusted Types refused.
    requests: every address that was asked for, in order.
    expected: words that mark complaints which belong to the test.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.expected: list[str] = []
        page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text} {said.location['url']}"))
        page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        page.on("dialog", self._dismiss)
        page.on("popup", lambda popup: self.complaints.append(f"window: {popup.url}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        # Some refusals stand in the browser's list of issues alone, and not in its console
        tools = page.context.new_cdp_session(page)
        tools.on("Audits.issueAdded", self._note_issue)
        tools.send("Audits.enable")

    def _dismiss(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _note_issue(self, event: dict[str, Any]) -> None:
        if event["issue"]["code"] == "ContentSecurityPolicyIssue":
            self.complaints.append(f"ContentSecurityPolicyIssue: {event['issue']['details']}")

    def goto(self, url: str) -> None:
        """Load an address afresh, though it may differ from the last one after the # alone."""
        self.page.goto("about:blank")
        self.page.goto(url)

    @property
    def unexpected(self) -> list[str]:
        """The complaints that hold none of the `expected` words."""
        return [line for line in self.complaints if not any(words in line for words in self.expected)]

    def outside(self, origin: str) -> set[str]:
        """The addresses that were asked for at any place but `origin`."""
        return {url for url in self.requests if _origin(url) != _origin(origin) and not url.startswith("about:")}


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url.removeprefix("blob:"))
    return parts.scheme, parts.netloc


def find_browser() -> str | None:
    """The path of the first of NAMES that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser that ends with the block. Skips the test where none is installed.

    Playwright keeps a loop of asyncio in the thread: code under test that starts one there must wait for the end of it.
    """
    binary = find_browser()
    if binary is None:
        pytest.skip(f"no browser is installed; one of {', '.join(NAMES)} would do")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=list(SWITCHES), timeout=1000 * 4 * PATIENCE)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_tab(browser: Browser, **options: Any) -> Iterator[Tab]:
    """A page in a new context: no cookie, key, or setting of another test. `options` are those of the context."""
    context = browser.new_context(**options)
    try:
        context.set_default_timeout(1000 * PATIENCE)
        yield Tab(context.new_page())
    finally:
        context.close()
