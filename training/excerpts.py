"""Passages of the project's own text on which a feature peaks, token by token: the only text that a bank quotes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from feature_bank.schema import Evidence

Decode = Callable[[list[int]], str]
_SPEAKERS = ("user", "assistant", "system")
_MOST_PARTS = 4  # tokens that one character is split into, at most


def excerpts(
    acts: npt.NDArray[np.float32],
    token_ids: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    decode: Decode,
    *,
    top: int,
    around: int = 12,
) -> list[Evidence]:
    """The best passage of each of the `top` documents where the feature is strongest.

    acts, token_ids, documents: (n,) the feature's normalised activation on every row, its token and its document.
    around: tokens shown on either side of the peak.
    """
    found: list[Evidence] = []
    seen: set[int] = set()
    firing = np.flatnonzero(acts > 0)
    for peak in firing[np.argsort(-acts[firing], kind="stable")].tolist():
        document = int(documents[peak])
        if document in seen:
            continue
        seen.add(document)
        first = last = peak
        while first > 0 and documents[first - 1] == document and peak - first < around:
            first -= 1
        while last + 1 < len(documents) and documents[last + 1] == document and last - peak < around:
            last += 1
        tokens, values = readable(token_ids[first : last + 1].tolist(), acts[first : last + 1].tolist(), decode)
        spoken = _after_speaker(tokens)
        tokens, values = tokens[spoken:], values[spoken:]
        if not values or max(values) < round(float(acts[peak]), 3):
            continue  # it peaks on the template's own word for who speaks
        found.append(
            Evidence(
                text="".join(tokens).strip(),
                peak=tokens[int(np.argmax(values))].strip(),
                activation=round(float(acts[peak]), 4),
                tokens=tokens,
                activations=values,
            )
        )
        if len(found) == top:
            break
    return found


def _after_speaker(tokens: Sequence[str]) -> int:
    """Where the text begins after what the chat template says of the speaker, as in `user\\n`."""
    for stop, token in enumerate(tokens[:3], 1):
        if token.endswith("\n"):
            return stop if "".join(tokens[:stop]).strip() in _SPEAKERS else 0
    return 0


def readable(ids: Sequence[int], acts: Sequence[float], decode: Decode) -> tuple[list[str], list[float]]:
    """The tokens as text, with those that make up one character together joined; of their activations the largest."""
    tokens: list[str] = []
    values: list[float] = []
    start = 0
    while start < len(ids):
        for stop in range(start + 1, min(start + _MOST_PARTS, len(ids)) + 1):
            text = decode(list(ids[start:stop]))
            if "\ufffd" not in text:
                break
        else:
            stop = start + 1  # the excerpt begins or ends within a character
            text = ""
        tokens.append(text)
        values.append(round(float(max(acts[start:stop])), 3))
        start = stop
    return tokens, values
