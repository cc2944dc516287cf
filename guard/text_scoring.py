"""Judging whole texts with one truncated forward pass each: moderation, evaluation and traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from feature_bank.layout import Rendered, Role, render, scored_positions
from guard.capture import length_batches, pad_batch, truncated_forward
from guard.events import SEVERITY, FeatureHit, Phase, TextScore, Trace, TraceToken
from guard.monitor import Judged, Monitor, sigmoid

BATCH_TOKENS = 4096


class TextScorer:
    """Scores texts with a monitor and a model; keeps nothing between calls."""

    def __init__(self, monitor: Monitor, model: Any, tokenizer: Any) -> None:
        self._monitor = monitor
        self._model = model
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._context = int(model.config.max_position_embeddings)

    def score(self, texts: Sequence[str], roles: Sequence[Role]) -> list[TextScore]:
        """One result a text, in order. Text beyond the context is cut, and `truncated` says so."""
        rendered = [render(self._tokenizer, t, r, max_tokens=self._context) for t, r in zip(texts, roles, strict=True)]
        results: dict[int, TextScore] = {}
        for index, hidden in self._encoded(rendered):
            results[index] = self._judge(rendered[index], roles[index], hidden)[0]
        return [results[i] for i in range(len(texts))]

    def trace(self, text: str, role: Role) -> Trace:
        """Every token of the text itself (not of the template around it) with its scores and strongest features."""
        rendered = render(self._tokenizer, text, role, max_tokens=self._context)
        (_, acts), *_ = self._encoded([rendered])
        score, judged, kept = self._judge(rendered, role, acts)
        row_of = {position: row for row, position in enumerate(kept.tolist())}
        tokens = []
        for position in range(rendered.start, len(rendered.ids)):
            row = row_of.get(position)
            logits = None if row is None else judged.logits[row].tolist()
            tokens.append(
                TraceToken(
                    index=position - rendered.start,
                    token_id=rendered.ids[position],
                    text=self._tokenizer.decode([rendered.ids[position]]),
                    observed=row is not None,
                    scores={}
                    if logits is None
                    else {d: sigmoid(z) for d, z in zip(self._monitor.domains, logits, strict=True)},
                    features=() if row is None else self._strongest(acts[position]),
                )
            )
        return Trace(tokens=tuple(tokens), score=score)

    def _encoded(self, rendered: Sequence[Rendered]) -> Iterator[tuple[int, Tensor]]:
        """(index, feature activations (n, F)) of every text, in batches of similar length."""
        encoder, device = self._monitor.encoder, self._monitor.device
        for batch in length_batches([len(r.ids) for r in rendered], BATCH_TOKENS):
            if not rendered[batch[-1]].ids:
                yield from ((i, torch.zeros(0, encoder.n_features, device=device)) for i in batch)
                continue
            ids, mask = pad_batch([rendered[i].ids for i in batch], 0, device)
            hidden = truncated_forward(self._model, encoder.hook_names, ids, mask)
            for row, index in enumerate(batch):
                length = len(rendered[index].ids)
                yield index, encoder.encode({name: h[row, :length] for name, h in hidden.items()})

    def _judge(self, rendered: Rendered, role: Role, acts: Tensor) -> tuple[TextScore, Judged, Tensor]:
        """The text's score, every kept token's logits, and the kept tokens' positions."""
        monitor = self._monitor
        keep = scored_positions(rendered, self._special)
        positions = torch.from_numpy(keep).to(monitor.device)
        segment = torch.zeros_like(positions)  # one message, one segment
        kept = acts[positions]
        judged = monitor.judge(kept, segment)
        phase: Phase = "response" if role == "response" else "prompt"
        in_text = (positions - rendered.start).clamp_min(0)
        verdicts = tuple(monitor.apply_rules(phase, "", judged, kept, segment, in_text))
        best = judged.agreed.max(0) if len(kept) else None
        scores = {d: 0.0 if best is None else sigmoid(float(best.values[i])) for i, d in enumerate(monitor.domains)}
        features: dict[str, tuple[FeatureHit, ...]] = {}
        for column, domain in enumerate(monitor.domains):
            features[domain] = () if best is None else self._hits_at(kept, segment, int(best.indices[column]), column)
        score = TextScore(
            scores=scores,
            flagged={d: any(v.domain == d for v in verdicts) for d in monitor.domains},
            action=max((v.action for v in verdicts), key=SEVERITY.__getitem__, default="allow"),
            verdicts=verdicts,
            features=features,
            tokens=len(rendered.ids) - rendered.start,
            truncated=rendered.truncated,
        )
        return score, judged, positions

    def _hits_at(self, acts: Tensor, segment: Tensor, at: int, column: int) -> tuple[FeatureHit, ...]:
        return self._monitor.hits(self._monitor.window_average(acts, segment, at), column)

    def _strongest(self, acts: Tensor) -> tuple[FeatureHit, ...]:
        """The features most active on one token, whatever the domain."""
        monitor = self._monitor
        order = acts.argsort(descending=True)[:5].tolist()
        largest = (acts.clamp_max(monitor.bank.pooling.ceiling)[:, None] * monitor.heads.weight).amax(1)
        return tuple(monitor.hit(i, acts, largest) for i in order if float(acts[i]) > 0)
