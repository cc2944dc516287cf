"""Small pieces of a decoding loop: choosing the next token, and turning tokens into text that may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guard.token_texts import TokenTexts

_LIKELY = 1024  # tokens among which the nucleus is looked for first; to sort a whole vocabulary takes milliseconds


class Sampler:
    """Greedy at temperature 0, else nucleus sampling from a generator of its own."""

    def __init__(self, *, temperature: float, top_p: float, seed: int | None) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def next_token(self, logits: Float[Tensor, " vocab"]) -> int:
        """The id of the next token."""
        if self._temperature <= 0.0:
            return int(logits.argmax())
        logits = logits.float().cpu()
        # From the largest down, so that a tiny temperature gives zeros and not infinities
        probabilities = torch.softmax((logits - logits.max()) / self._temperature, dim=-1)
        if self._top_p < 1.0:
            ordered, order = probabilities.topk(min(_LIKELY, len(probabilities)))
            if float(ordered.sum()) < self._top_p:
                ordered, order = probabilities.sort(descending=True)
            dropped = ordered.cumsum(0) - ordered >= self._top_p
            dropped[0] = False
            ordered[dropped] = 0.0
            probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


class TextStream:
    """Turns token ids into text as they come: no half characters, and nothing at or beyond a stop sequence."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(s for s in stop if s)
        self._texts = TokenTexts(partial(tokenizer.decode, skip_special_tokens=True))
        self._held = ""  # text that may turn out to begin a stop sequence
        self.stopped = False
        self.pieces: list[str] = []
        """The text of each token, as far as it is known; of a special token it is empty."""

    def push(self, token_id: int) -> str:
        """The text that can be shown now that `token_id` has come. Sets `stopped` when a stop sequence is complete."""
        known = self._texts.push(token_id)
        self.pieces += known
        return self._release(self._held + "".join(known)) if known else ""

    def flush(self) -> str:
        """What was held back, at the end of the stream; nothing after a stop sequence."""
        if self.stopped:
            return ""
        known = self._texts.flush()
        self.pieces += known
        text, self._held = self._held + "".join(known), ""
        return text

    def _release(self, text: str) -> str:
        found = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]
