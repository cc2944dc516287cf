"""Judging whole texts with one truncated forward pass each: moderation, evaluation and traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from feature_bank.layout import Rendered, Role, render
from guard.capture import length_batches, pad_batch, truncated_forward
from guard.events import TextScore, Trace
from guard.judge import TOP_FEATURES, Floats
from guard.metrics import Metrics
from guard.monitor import Monitor
from guard.reports import ShownFeatures
from guard.text_judging import score_text, trace_text

BATCH_TOKENS = 4096


class TextScorer:
    """Scores texts with a monitor and a model; keeps nothing between calls. metrics: where features are to be shown."""

    def __init__(self, monitor: Monitor, model: Any, tokenizer: Any, metrics: Metrics | None = None) -> None:
        self._monitor = monitor
        self._shown = None if metrics is None else ShownFeatures(metrics, monitor.bank)
        self._model = model
        self._tokenizer = tokenizer
        self._special = frozenset[int](tokenizer.all_special_ids)
        self._context = int(model.config.max_position_embeddings)

    def score(
        self, texts: Sequence[str], roles: Sequence[Role], *, keep: Sequence[bool] | None = None
    ) -> list[TextScore]:
        """One result a text, in order. Text beyond the context is cut, and `truncated` says so.

        keep: of which texts the results hold what was seen; with it, those of texts on which a rule fires do too.
        """
        rendered = [render(self._tokenizer, t, r, max_tokens=self._context) for t, r in zip(texts, roles, strict=True)]
        results: dict[int, TextScore] = {}
        for index, acts in self._encoded(rendered):
            if self._shown is not None:
                self._shown.observe(acts)
            kept = None if keep is None else keep[index]
            results[index] = score_text(self._monitor, rendered[index], roles[index], acts, self._special, keep=kept)
        return [results[i] for i in range(len(texts))]

    def trace(self, text: str, role: Role, *, top: int | None = TOP_FEATURES) -> Trace:
        """Every token of the text itself (not of the template around it) with its scores and its `top` strongest
        features, or all that are active."""
        rendered = render(self._tokenizer, text, role, max_tokens=self._context)
        (_, acts), *_ = self._encoded([rendered])
        decode = partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)
        return trace_text(self._monitor, rendered, role, acts, self._special, decode, top)

    def _encoded(self, rendered: Sequence[Rendered]) -> Iterator[tuple[int, Floats]]:
        """(index, feature activations (n, F)) of every text, in batches of similar length."""
        encoder, device = self._monitor.encoder, self._monitor.device
        for batch in length_batches([len(r.ids) for r in rendered], BATCH_TOKENS):
            if not rendered[batch[-1]].ids:
                yield from ((i, np.zeros((0, encoder.n_features), dtype=np.float32)) for i in batch)
                continue
            ids, mask = pad_batch([rendered[i].ids for i in batch], 0, device)
            hidden = truncated_forward(self._model, encoder.hook_names, ids, mask)
            for row, index in enumerate(batch):
                length = len(rendered[index].ids)
                yield index, encoder.encode({name: h[row, :length] for name, h in hidden.items()}).cpu().numpy()
