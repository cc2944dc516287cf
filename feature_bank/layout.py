"""How text becomes tokens, which tokens count, and where a window of evidence begins.

Fitting and guarding share this file: a head learnt on one layout would mean little on another. Special tokens
are not scored (the first position is an attention sink whose activations dwarf all others), and each one ends
the window that ran before it, so that the messages of a chat are judged apart and a short request is not
diluted by a system prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

Role = Literal["prompt", "response", "passage"]
ROLES: tuple[Role, ...] = get_args(Role)


class Rendered(NamedTuple):
    """Token ids, the position at which the text itself begins, and whether its end was cut off."""

    ids: list[int]
    start: int
    truncated: bool


class Chat(NamedTuple):
    """The ids of a conversation, and the position at which the last message's text begins."""

    ids: list[int]
    start: int


class Layout(NamedTuple):
    """Per token: whether it is scored, and the number of its segment (windows do not cross segments)."""

    observed: npt.NDArray[np.bool_]
    segment: npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """What of a Hugging Face tokenizer is used here."""

    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """The ids of a text, under the key `input_ids`."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any:
        """The text (or ids) of a conversation."""


def clean(text: str) -> str:
    """Text that any tokenizer takes: lone surrogates become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of untrusted text: the spelling of a special token in it is ordinary text, not a control token."""
    ids: list[int] = tokenizer(clean(text), add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    return ids


_MARK = "\u241f"  # a symbol that no template contains


def head_ids(tokenizer: Tokenizer, role: Role) -> list[int]:
    """The ids before a text in the given role: the template's opening, or one begin-of-sequence token."""
    if role == "prompt":
        return _template_pieces(tokenizer, ["user"], add_generation_prompt=False)[0]
    sink = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if sink is None else [sink]


def render(tokenizer: Tokenizer, text: str, role: Role, *, max_tokens: int, head: list[int] | None = None) -> Rendered:
    """The ids the model reads when `text` is a user's prompt (chat template), a response or a passage (plain text).

    At most `max_tokens` ids in all; the end of the text is cut. `head` spares rendering the template again for many
    texts of one role: it is `head_ids` of that role.
    """
    # A megabyte of text would be tokenised in full only to be cut; hardly a token is longer than 64 characters
    excerpt = text[: max_tokens * 64]
    if head is None:
        head = head_ids(tokenizer, role)
    ids = content_ids(tokenizer, excerpt)
    room = max(0, max_tokens - len(head))
    return Rendered(head + ids[:room], len(head), len(ids) > room or len(excerpt) < len(text))


def chat_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> Chat:
    """The ids of a chat. Contents cannot forge control tokens, nor can they meet the template's own code.

    The template is rendered around marks, and each content is tokenised on its own.

    Raises ValueError (and what the template raises) for messages that the template does not take.
    """
    first, *others = _template_pieces(
        tokenizer, [m["role"] for m in messages], add_generation_prompt=add_generation_prompt
    )
    ids, start = list(first), len(first)
    for message, piece in zip(messages, others, strict=True):
        start = len(ids)
        ids += content_ids(tokenizer, message["content"])
        ids += piece
    return Chat(ids, start)


def _template_pieces(tokenizer: Tokenizer, roles: Sequence[str], *, add_generation_prompt: bool) -> list[list[int]]:
    """The ids before, between and after the contents of messages with the given roles: one list more than roles."""
    marked = [{"role": role, "content": _MARK} for role in roles]
    rendered: str = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=add_generation_prompt)
    pieces = rendered.split(_MARK)
    if len(pieces) != len(roles) + 1:
        raise ValueError("the chat template drops or repeats messages")
    return [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]


def template_segments(tokenizer: Tokenizer, special_ids: Collection[int]) -> frozenset[tuple[int, ...]]:
    """The stretches between special tokens that the chat template puts around a request by itself.

    Such are its default system prompt and the line that opens the answer. Empty if there is no usable template.
    """
    try:
        before, after = _template_pieces(tokenizer, ["user"], add_generation_prompt=True)
    except Exception:  # noqa: BLE001  # a template that refuses a plain request, whatever its reason, adds nothing to one
        return frozenset()
    found: set[tuple[int, ...]] = set()
    for piece, skipped in ((before, -1), (after, 0)):  # the stretch that touches the request is part of it
        stretches: list[list[int]] = [[]]
        for token in piece:
            if token in special_ids:
                stretches.append([])
            else:
                stretches[-1].append(token)
        del stretches[skipped]
        found |= {tuple(stretch) for stretch in stretches if stretch}
    return frozenset(found)


def layout(
    ids: Sequence[int], special_ids: Collection[int], template: Collection[tuple[int, ...]] = frozenset()
) -> Layout:
    """Which positions of `ids` are scored, and their segments, numbered from 0.

    template: stretches that nobody said (see `template_segments`); one that is a whole segment is not scored.
    """
    special = np.isin(np.asarray(ids, dtype=np.int64), np.fromiter(special_ids, dtype=np.int64))
    segment = np.cumsum(special, dtype=np.int64)
    observed = ~special
    if template:
        edges = [-1, *np.flatnonzero(special).tolist(), len(ids)]
        for left, right in pairwise(edges):
            if tuple(ids[left + 1 : right]) in template:
                observed[left + 1 : right] = False
    return Layout(observed=observed, segment=segment)


def scored_positions(rendered: Rendered, special_ids: Collection[int]) -> npt.NDArray[np.int64]:
    """The positions that count when one rendered text is judged on its own: its segment, as a chat would see it.

    In a chat template that includes the few tokens which name the speaker; other messages' text does not
    count.
    """
    if rendered.start == len(rendered.ids):
        return np.zeros(0, dtype=np.int64)
    placed = layout(rendered.ids, special_ids)
    return np.flatnonzero(placed.observed & (placed.segment == placed.segment[rendered.start]))
