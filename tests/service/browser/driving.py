"""What a person does in the playground, in the words of its controls."""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import Locator, Page, expect

PATIENCE = 60_000
"""Milliseconds for an answer of the embedded model on a busy machine."""


def remember(page: Page, storage: str, name: str, value: str) -> None:
    """Let the page find `value` in its storage whenever it is loaded. A blank page has none."""
    put = f"{storage}.setItem({json.dumps(name)}, {json.dumps(value)})"
    page.add_init_script(f"if (location.protocol === 'http:') {put};")


def settings(page: Page) -> Locator:
    """The settings of the chat, opened."""
    found = page.locator("#pg-settings")
    if not found.is_visible():
        page.get_by_role("button", name="Settings", exact=True).click()
    return found


def send(page: Page, text: str, *, max_tokens: int = 12, seed: int = 7, temperature: float | None = None) -> None:
    """Send a chat message, without waiting for the answer."""
    given = {"Max tokens": max_tokens, "Seed": seed, "Temperature": temperature}
    opened = settings(page)
    for name, value in given.items():
        if value is not None:
            opened.get_by_role("spinbutton", name=name).fill(str(value))
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def read(page: Page, text: str, role: str = "prompt") -> None:
    """Have a text read, without waiting for the end."""
    page.get_by_role("button", name="Text", exact=True).click()
    page.get_by_role("textbox", name="Text", exact=True).fill(text)
    page.get_by_role("combobox", name="Read as").select_option(role)
    page.get_by_role("button", name="Read text", exact=True).click()


def ended(page: Page, state: str = "done") -> Locator:
    """The last turn, once it is in that state."""
    turn = page.locator("section.pg-turn").last
    expect(turn).to_have_attribute("data-state", state, timeout=PATIENCE)
    return turn


def tokens(flow: Locator, phase: str | None = None) -> list[str]:
    """The texts of the tokens of a flow, or of one phase of it."""
    cells = flow.locator(".tok" if phase is None else f".tok[data-phase={phase}]")
    return cells.evaluate_all("(cells) => cells.map((cell) => cell.textContent)")


def flow_of(turn: Locator, run: str = "plain") -> Locator:
    return turn.locator(f".pg-flow[data-run={run}]")


def posted(tab: Any, path: str = "/v1/playground") -> list[str]:
    """The requests of a tab to a path."""
    return [url for url in tab.requests if url.split("?")[0].endswith(path)]
