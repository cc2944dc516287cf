"""Text in bulk, as SAEs are trained on it: streamed from files, tokenised, and kept as compactly as it can be."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from feature_bank.errors import DataError
from feature_bank.layout import Tokenizer, chat_ids, clean, head_ids, layout, render, scored_positions
from training.corpus import TokenSequence, read_objects

TextFormat = Literal["chat", "plain"]
"""chat: as a user's message (or a whole conversation) in the model's chat template. plain: as it stands."""


class TokenTable(Sequence[TokenSequence]):
    """Token sequences in five bytes a token, which is an eighth of what lists of numbers take."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._scored = bytearray()
        self._ends = array("q", [0])
        self._documents = array("q")
        self._special = array("i")

    def append(self, sequence: TokenSequence) -> None:
        """Add a sequence at the end."""
        scored = np.zeros(len(sequence.ids), dtype=np.uint8)
        scored[sequence.positions] = 1
        self._ids.extend(sequence.ids)
        self._scored += scored.tobytes()
        self._ends.append(len(self._ids))
        self._documents.append(sequence.document)
        self._special.append(sequence.special)

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> TokenSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenSequence]: ...
    def __getitem__(self, index: int | slice) -> TokenSequence | list[TokenSequence]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, stop = self._ends[index], self._ends[index + 1]
        return TokenSequence(
            document=self._documents[index],
            ids=self._ids[start:stop].tolist(),
            positions=np.flatnonzero(np.frombuffer(self._scored[start:stop], dtype=np.uint8)),
            special=self._special[index],
        )


@dataclass(kw_only=True)
class TextCounts:
    """What became of the rows of the files."""

    rows: int = 0
    repeated: int = 0
    """Exact repeats of an earlier row, which are left out."""
    empty: int = 0
    """Rows of which no token is kept."""
    cut: int = 0
    """Rows of which the end was cut off."""
    kept_tokens: int = 0
    special_tokens: int = 0
    """Special tokens in the rows that are kept: the model reads them, their activations are left out."""


def read_texts(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    text_format: TextFormat,
    max_tokens: int,
    total_tokens: int | None = None,
) -> tuple[TokenTable, TextCounts]:
    """The rows of JSON-lines files as token sequences; a sequence's document is the number of its row over all files.

    A row has a string `text`; with the format "chat" it may have `messages` instead, a list of objects with `role` and
    `content`. max_tokens: of a text, the template around it not counted (of a conversation: with the template).
    total_tokens: reading ends with the row that reaches so many kept tokens.

    Raises DataError naming file, line and field.
    """
    if max_tokens < 1:
        raise DataError(f"max_tokens is {max_tokens}; at least one token of a text must be kept")
    table, counts = TokenTable(), TextCounts()
    seen: set[bytes] = set()
    special = frozenset(tokenizer.all_special_ids)
    role: Literal["prompt", "passage"] = "prompt" if text_format == "chat" else "passage"
    head = head_ids(tokenizer, role)
    for path in paths:
        for number, row in read_objects(path):
            if total_tokens is not None and counts.kept_tokens >= total_tokens:
                return table, counts
            document, counts.rows = counts.rows, counts.rows + 1
            where = f"{path}, line {number}"
            text = row.get("text")
            if text_format == "chat" and "messages" in row:
                ids = _conversation(row["messages"], tokenizer, where)
                cut, ids = len(ids) > max_tokens, ids[:max_tokens]
                positions = np.flatnonzero(layout(ids, special).observed)
            elif isinstance(text, str):
                rendered = render(tokenizer, clean(text), role, max_tokens=len(head) + max_tokens, head=head)
                ids, cut, positions = rendered.ids, rendered.truncated, scored_positions(rendered, special)
            else:
                raise DataError(f"{where}, field 'text': expected an object with a string field 'text'")
            digest = hashlib.blake2b(array("i", ids).tobytes(), digest_size=16).digest()
            if digest in seen:
                counts.repeated += 1
                continue
            seen.add(digest)
            if not len(positions):
                counts.empty += 1
                continue
            n_special = sum(token in special for token in ids)
            table.append(TokenSequence(document=document, ids=ids, positions=positions, special=n_special))
            counts.cut += cut
            counts.kept_tokens += len(positions)
            counts.special_tokens += n_special
    return table, counts


def _conversation(messages: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    from jinja2 import TemplateError  # what chat templates are rendered with

    def is_message(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))

    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise DataError(f"{where}, field 'messages': expected a list of objects with the strings 'role' and 'content'")
    try:
        return chat_ids(tokenizer, messages).ids
    except (ValueError, TemplateError) as e:
        raise DataError(f"{where}, field 'messages': the model's chat template does not take them: {e}") from e
