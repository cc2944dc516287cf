"""Texts of one domain and none, a spool with marks on them, and the order in which a bank's head has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from feature_bank.bank import Bank
from feature_bank.spool import Acts, Selection, Spool, SpoolItem, pack
from training.refresh_heads import forms_of, score
from training.refresh_texts import Texts

WORDS = ["amber", "birch", "cedar", "delta", "ember", "frost", "grove", "haven", "inlet", "jetty", "knoll", "larch"]
LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def write_texts(path: Path, seed: int, *, odd: bool = False, source: str = "sailguard") -> Path:
    """Rows of words, or of repeated letters, which look like none of them."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for number in range(160):
            row = {
                "id": f"sg-poli-{number}",
                "text": "".join(rng.choice(LETTERS, 2)) * 12 if odd else " ".join(rng.choice(WORDS, 6)),
                "role": "passage",
                "domains": ["politics"] if number % 2 else [],
                "known": ["politics"],
                "source": source,
                "licence": "CC0-1.0",
            }
            file.write(json.dumps(row) + "\n")
    return path


def item_of(bank: Bank, number: int, acts: Acts, *, flagged: bool, text: str | None = None) -> SpoolItem:
    """A text as the bank judged it, and kept."""
    return SpoolItem(
        unix=1e9,
        request_id=f"r{number}",
        endpoint="moderations",
        choice=0,
        phase="prompt",
        streamed=False,
        bank=bank.version,
        content_hash=bank.content_hash,
        policy="test",
        model="tiny",
        action="flag" if flagged else "allow",
        scores=dict.fromkeys(bank.heads, 0.5),
        flagged=("politics",) if flagged else (),
        tokens=len(acts.segments),
        acts=pack(*acts),
        why="sampled",
        text=text,
    )


def add_marked(spool: Spool, item: SpoolItem, mark: Any) -> None:
    """Add an item with a mark on it."""
    spool.add([item])
    number = spool.newest(Selection(), limit=1)[0].id
    assert number is not None
    spool.mark(number, "politics", mark, reviewer="an analyst")


def spool_of(path: Path, bank: Bank, texts: Texts, rows: list[int], mark: Any, *, marked: bool = True) -> Path:
    """A spool with some of the texts as items."""
    with Spool.open_for_writing(path) as spool:
        for row in rows:
            one = texts.choose(np.array([row]))
            acts = Acts(one.segment, one.acts.toarray())
            item = item_of(bank, row, acts, flagged=mark == "false_positive")
            if marked:
                add_marked(spool, item, mark)
            else:
                spool.add([item])
    return path


def ranked(bank: Bank, texts: Texts) -> list[int]:
    """The texts, the one that looks most like politics first."""
    position = {feature.id: place for place, feature in enumerate(bank.features)}
    form = forms_of(bank.heads["politics"], bank.pooling, position)[0]
    return [int(row) for row in np.argsort(-score(form, texts))]
