"""The text of every token, such that the texts of a document's tokens, joined, are the document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Decode = Callable[[list[int]], str]
_BROKEN = "\ufffd"
_LONGEST = 8  # tokens over which one character may be spread


def token_texts(token_ids: npt.NDArray[Any], documents: npt.NDArray[Any], decode: Decode) -> list[str]:
    """(tokens,) what each token adds to its document's text.

    A character that is spread over several tokens is the text of the last of them, and the others are empty. Bytes
    that never become a character are left out.

    documents: (tokens,) the document of every token; those of a document lie together.
    """
    ids: list[int] = np.asarray(token_ids).tolist()
    owners: list[int] = np.asarray(documents).tolist()
    single = _single_texts(sorted(set(ids)), decode)
    texts = [single[token] for token in ids]
    known: dict[tuple[int, ...], str] = {}
    pending: list[int] = []  # rows of tokens whose bytes are not yet a character
    for row, text in enumerate(texts):
        broken = _BROKEN in text
        if pending and (owners[pending[0]] != owners[row] or not broken):  # a whole character continues no other
            _drop(texts, pending)
        if not broken:
            continue
        pending.append(row)
        key = tuple(ids[i] for i in pending)
        if key not in known:
            known[key] = decode(list(key)) if len(key) > 1 else text
        joined = known[key]
        if _BROKEN not in joined or len(pending) == _LONGEST:
            for i in pending:
                texts[i] = ""
            texts[row] = joined.replace(_BROKEN, "")
            pending.clear()
    _drop(texts, pending)
    return texts


def _drop(texts: list[str], pending: list[int]) -> None:
    """What was left of a character that did not become one."""
    for row in pending:
        texts[row] = texts[row].replace(_BROKEN, "")
    pending.clear()


def _single_texts(ids: Sequence[int], decode: Decode) -> dict[int, str]:
    """What each token adds after an ordinary one: some tokenizers drop the space before a token that stands alone."""
    anchor = next((i for i in ids if decode([i]).strip().isalpha() and decode([i]).isascii()), None)
    if anchor is None:
        return {i: decode([i]) for i in ids}
    before = decode([anchor])
    found = {}
    for i in ids:
        both = decode([anchor, i])
        found[i] = both[len(before) :] if both.startswith(before) else decode([i])
    return found
