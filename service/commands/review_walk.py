"""The walk through features on a terminal: a card, a question, and a verdict that is written at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_bank.errors import SailguardError
from feature_bank.review import append_reviews, load_labels
from feature_bank.taxonomy import DOMAINS
from feature_bank.verdicts import Draft, parse_record
from service.commands.card import print_card
from service.commands.terminal import plain

if TYPE_CHECKING:
    from rich.console import Console

    from feature_bank.bank import Bank
    from feature_bank.schema import FeatureRecord

__all__ = ["Walk"]

_QUESTION = "[a]ccept [r]eject re[l]abel [n]ote [s]kip [q]uit: "
_VERDICTS = {"a": "accept", "r": "reject", "l": "relabel", "n": "note"}
_NOTHING = "-"


class Walk:
    """Shows features one after the other and asks for a verdict on each.

    ask: puts a question and gives the answer, as `input` does; EOFError ends the walk.
    """

    def __init__(self, path: Path, bank: Bank, *, reviewer: str, console: Console, ask: Callable[[str], str]) -> None:
        self._path = path
        self._bank = bank
        self._reviewer = reviewer
        self._console = console
        self._ask = ask
        self.written = 0

    def go(self, features: Sequence[FeatureRecord]) -> None:
        """Walk through the features until the last one, or until the reviewer quits."""
        for number, feature in enumerate(features, 1):
            self._console.rule(f"{number} of {len(features)}", style="dim")
            self._show(feature)
            try:
                if not self._judge(feature):
                    return
            except EOFError:
                self._console.print()
                return

    def _show(self, feature: FeatureRecord) -> None:
        log, labels = load_labels(self._path, self._bank)
        reviews = [review for review in log.reviews if review.feature == feature.id]
        print_card(self._console, self._bank, feature, labels[feature.id], reviews)

    def _judge(self, feature: FeatureRecord) -> bool:
        """Ask until the feature has a verdict or is skipped. False: the reviewer quits. A note asks for more."""
        while True:
            answer = self._ask(_QUESTION).strip().lower()[:1]
            if answer == "q":
                return False
            if answer == "s":
                return True
            if answer not in _VERDICTS:
                continue
            try:
                self._write(feature, _VERDICTS[answer])
            except SailguardError as error:
                self._console.print(plain(str(error)), markup=False, soft_wrap=True, style="red")
                continue
            if answer != "n":
                return True

    def _write(self, feature: FeatureRecord, verdict: str) -> None:
        overrides = self._ask_label() if verdict == "relabel" else None
        question = "why: " if verdict in ("reject", "note") else "why (may be empty): "
        data = {"verdict": verdict, "overrides": overrides, "reviewer": self._reviewer, "reason": self._ask(question)}
        draft = parse_record(Draft, {"feature": feature.id, **data}, "review")
        append_reviews(self._path, [draft], bank=self._bank)
        self.written += 1

    def _ask_label(self) -> dict[str, Any]:
        """The fields to change. What is left empty stays, a dash takes all away."""
        self._console.print("leave a field empty to keep it; - takes all away", style="dim")
        overrides: dict[str, Any] = {}
        for name, hint in (("domains", f" ({', '.join(DOMAINS)})"), ("concepts", "")):
            if answer := self._ask(f"{name}{hint}: ").strip():
                given = [part.strip() for part in answer.split(",") if part.strip()]
                overrides[name] = [] if answer == _NOTHING else list(dict.fromkeys(given))
        if answer := self._ask("explanation: ").strip():
            overrides["explanation"] = answer
        return overrides
