"""The page in a browser, before servers around the fake engine and around the embedded model.

A tab that said anything in its console, or asked for anything outside its server, fails the test in which it did;
`tab.expected` names what belongs to a test.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import pytest

from feature_bank.bank import shipped_bank_path
from tests.browser import PATIENCE, Tab, open_browser, open_tab
from tests.service.browser.driving import remember

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE = {"width": 1440, "height": 900}
KEYS = {"admin": "key-of-an-admin", "client": "key-of-a-client", "reader": "key-of-a-reader"}

Visit = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import expect

    expect.set_options(timeout=1000 * PATIENCE)
    with open_browser() as browser:
        yield browser


@pytest.fixture
def new_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """Open tabs that share nothing; keyword arguments are options of the context."""
    with contextlib.ExitStack() as stack:
        tabs: list[Tab] = []

        def open_one(**options: Any) -> Tab:
            given = {"viewport": WIDE, "reduced_motion": "reduce", "locale": "en-GB", **options}
            tabs.append(stack.enter_context(open_tab(browser, **given)))
            return tabs[-1]

        yield open_one
        for tab in tabs:
            assert tab.unexpected == []
            assert len({urlsplit(url.removeprefix("blob:")).netloc for url in tab.requests if "about:" not in url}) <= 1


@pytest.fixture
def tab(new_tab: Callable[..., Tab]) -> Tab:
    return new_tab()


@pytest.fixture
def visit(tab: Tab) -> Visit:
    """Load a view of the server at `url` afresh, with its state as keyword arguments, and wait until it is there."""

    def go(url: str, view: str = "playground", **state: str) -> Page:
        query = urlencode(state)
        tab.goto(f"{url}/#/{view}{'?' if query else ''}{query}")
        tab.page.locator(f"main .view-{view}").wait_for()
        return tab.page

    return go


@pytest.fixture
def bank_copy(tmp_path: Path) -> Path:
    """A copy of the shipped bank, to which reviews may be added."""
    copy = shutil.copytree(shipped_bank_path(), tmp_path / "bank")
    for path in (copy, *copy.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    return Path(copy)


@pytest.fixture(scope="module")
def real_engine(embedded: Any) -> Iterator[Any]:
    """The embedded model under the shipped bank, for one module: its guard hangs on a model that all tests share."""
    from guard.core import Guard
    from guard.metrics import Metrics
    from guard.serving import ServingGuard
    from service.engine import TransformersEngine

    serving = ServingGuard(Guard.from_bank(metrics=Metrics()), embedded.model, embedded.tokenizer)
    with contextlib.closing(TransformersEngine(serving, embedded.model_id)) as engine:
        yield engine


@pytest.fixture
def real(serve: Callable[..., str], real_engine: Any, tmp_path: Path) -> str:
    """The address of a server around the embedded model, without keys, that keeps what it judged."""
    return serve(real_engine, audit=tmp_path / "audit.sqlite", audit_text=True)


@pytest.fixture
def keyed(tmp_path: Path) -> dict[str, Any]:
    """Settings of a server with one key of each role, those of KEYS."""
    from service.auth import Principal, Role
    from service.key_file import hashed_line

    lines = [hashed_line(key, Principal(key_id=f"the-{role}", role=Role(role))) for role, key in KEYS.items()]
    path = tmp_path / "keys"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    path.chmod(0o600)
    return {"api_keys_file": path}


@pytest.fixture
def sign_in(tab: Tab) -> Callable[[str], None]:
    """Make the tab's next pages use the key of a role."""

    def use(role: str) -> None:
        remember(tab.page, "sessionStorage", "sailguard-key", KEYS[role])

    return use


class Restartable:
    """A server that can be stopped, and started again at the same address."""

    def __init__(self, make: Callable[..., Any], thread: Any) -> None:
        self._make, self._thread = make, thread
        self._running: Any = None
        self.port = 0

    def start(self) -> str:
        app = self._make(self.port)
        self._running = self._thread(app, app.state.services.settings)
        url: str = self._running.__enter__()
        self.port = int(url.rsplit(":", 1)[1])
        return url

    def cut(self) -> None:
        """Break every connection at once, as a machine that goes away does, and stop."""
        if self._running is not None:
            self._running.server.force_exit = True
        self.stop()

    def stop(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.__exit__(None, None, None)


@pytest.fixture
def restartable(make_app: Callable[..., Any], server_thread: Any) -> Iterator[Callable[..., Restartable]]:
    """Make a server around `served` that the test starts and stops; keyword arguments are settings."""
    made: list[Restartable] = []

    def make(served: Any = None, **settings: Any) -> Restartable:
        made.append(Restartable(lambda port: make_app(served, **{**settings, "port": port}), server_thread))
        return made[-1]

    yield make
    for server in made:
        server.stop()
