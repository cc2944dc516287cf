"""Text that nobody has vouched for, as a page may show it."""

from __future__ import annotations

import re

__all__ = ["visible", "visible_token"]

# Control characters but for tab and newline, the marks that reorder what is shown, and what cannot be encoded
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with its control characters as the pictures Unicode has for them, such as ␛, and the rest as U+FFFD.

    It is not escaped: that is the template engine's work.
    """
    return _UNSEEN.sub(_picture, text)


def visible_token(text: str) -> str:
    """A token or n-gram on its own: white space at its ends, which would not be seen, as ␣, ⇥ and ↵."""
    core = text.strip(" \t\n")
    start = text.find(core) if core else len(text)
    ends = (text[:start], text[start + len(core) :])
    before, after = (part.replace(" ", "␣").replace("\t", "⇥").replace("\n", "↵") for part in ends)
    return visible(before + core + after)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"
