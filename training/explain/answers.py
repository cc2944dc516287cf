"""Text that goes to a language model as data, and its answers, read strictly: one JSON object, or nothing at all."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_ANSWER_CHARS = 200_000
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCED = re.compile(r"\A```[A-Za-z]*[ \t]*\n(.*)\n[ \t]*```\Z", re.DOTALL)
# What could drive a terminal, reorder what is shown or not be encoded at all; line breaks become spaces before.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]")

# Line breaks that JSON leaves as they are.
_BREAKS = re.compile("[\x7f\x85\u2028\u2029]")


def quote_line(text: str) -> str:
    """A JSON string that stays on one line, whatever stands in it."""
    return _BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def read_object(text: str) -> dict[str, Any] | None:
    """The one JSON object that an answer consists of, or None.

    A Markdown fence around it and a block of thoughts before it are tolerated. Anything else beside it, half an object,
    a key given twice or a number that JSON does not know make the whole answer unusable: guessing what was meant would
    turn noise into a score.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    body = _THOUGHTS.sub("", text, count=1).strip().removeprefix("\ufeff")
    if fenced := _FENCED.match(body):
        body = fenced[1]
    try:
        found = json.loads(body, object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def clean_text(text: str, *, limit: int) -> str:
    """Untrusted text on one line, without control characters, at most `limit` characters long.

    Cut, it ends with an ellipsis.
    """
    line = " ".join(_UNSAFE.sub("", re.sub(r"\s+", " ", text)).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
