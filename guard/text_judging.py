"""From the activations of one rendered text to its score and its trace, whatever read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from feature_bank.layout import Rendered, Role, scored_positions
from guard.events import SEVERITY, FeatureHit, Phase, TextScore, Trace, TraceToken
from guard.judge import TOP_FEATURES, Floats, Judge, Judged, sigmoid


def score_text(
    judge: Judge, rendered: Rendered, role: Role, feature_acts: Floats, special_ids: Collection[int]
) -> TextScore:
    """The score of a text, of which every token has its activations (n, F).

    Raises GuardError if the activations are not numbers.
    """
    return _score(judge, rendered, role, feature_acts, special_ids)[0]


def trace_text(
    judge: Judge,
    rendered: Rendered,
    role: Role,
    feature_acts: Floats,
    special_ids: Collection[int],
    decode: Callable[[Sequence[int]], str],
) -> Trace:
    """Every token of the text itself (not of the template around it) with its scores and strongest features."""
    score, judged, kept = _score(judge, rendered, role, feature_acts, special_ids)
    row_of = {position: row for row, position in enumerate(kept.tolist())}
    tokens = []
    for position in range(rendered.start, len(rendered.ids)):
        row = row_of.get(position)
        logits = None if row is None else judged.logits[row].tolist()
        tokens.append(
            TraceToken(
                index=position - rendered.start,
                token_id=rendered.ids[position],
                text=decode([rendered.ids[position]]),
                observed=row is not None,
                scores={} if logits is None else {d: sigmoid(z) for d, z in zip(judge.domains, logits, strict=True)},
                features=() if row is None else _strongest(judge, feature_acts[position]),
            )
        )
    return Trace(tokens=tuple(tokens), score=score)


def _score(
    judge: Judge, rendered: Rendered, role: Role, feature_acts: Floats, special_ids: Collection[int]
) -> tuple[TextScore, Judged, npt.NDArray[np.int64]]:
    """The text's score, every kept token's logits, and the kept tokens' positions."""
    positions = scored_positions(rendered, special_ids)
    segment = np.zeros_like(positions)  # one message, one segment
    kept = feature_acts[positions]
    judged = judge.judge(kept, segment)
    phase: Phase = "response" if role == "response" else "prompt"
    in_text = np.maximum(positions - rendered.start, 0)
    verdicts = tuple(judge.apply_rules(phase, "", judged, kept, segment, in_text))
    scores = dict.fromkeys(judge.domains, 0.0)
    features: dict[str, tuple[FeatureHit, ...]] = dict.fromkeys(judge.domains, ())
    if len(kept):
        for column, domain in enumerate(judge.domains):
            at = int(judged.agreed[:, column].argmax())
            scores[domain] = sigmoid(float(judged.agreed[at, column]))
            features[domain] = judge.hits(judge.window_average(kept, segment, at), column)
    score = TextScore(
        scores=scores,
        flagged={d: any(v.domain == d for v in verdicts) for d in judge.domains},
        action=max((v.action for v in verdicts), key=SEVERITY.__getitem__, default="allow"),
        verdicts=verdicts,
        features=features,
        tokens=len(rendered.ids) - rendered.start,
        truncated=rendered.truncated,
    )
    return score, judged, positions


def _strongest(judge: Judge, acts: Floats) -> tuple[FeatureHit, ...]:
    """The features most active on one token (F,), whatever the domain."""
    order = np.argsort(-acts, kind="stable")[:TOP_FEATURES].tolist()
    largest = (judge.heads.clip(acts)[:, None] * judge.heads.weight).max(1)
    return tuple(judge.hit(i, acts, largest) for i in order if acts[i] > 0)
