"""From the activations of one rendered text to its score and its trace, whatever read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from feature_bank.layout import Rendered, Role, scored_positions
from feature_bank.spool_acts import Acts
from guard.events import SEVERITY, FeatureHit, Phase, TextScore, Trace, TraceToken
from guard.judge import TOP_FEATURES, Floats, Judge, Judged, sigmoid
from guard.token_texts import token_texts


def score_text(
    judge: Judge,
    rendered: Rendered,
    role: Role,
    feature_acts: Floats,
    special_ids: Collection[int],
    *,
    keep: bool | None = None,
) -> TextScore:
    """The score of a text, of which every token has its activations (n, F).

    keep: whether the score holds what was seen of the judged tokens: always, or where a rule fires; None for never.
    Raises GuardError if the activations are not numbers.
    """
    score, _, kept = _score(judge, rendered, role, feature_acts, special_ids)
    if keep is None or not (keep or score.verdicts):
        return score
    return replace(score, seen=_seen(feature_acts, kept))


def trace_text(
    judge: Judge,
    rendered: Rendered,
    role: Role,
    feature_acts: Floats,
    special_ids: Collection[int],
    decode: Callable[[list[int]], str],
    top: int | None = TOP_FEATURES,
) -> Trace:
    """Every token of the text itself (not of the template around it) with its scores and its `top` strongest features,
    or all that are active."""
    score, judged, kept = _score(judge, rendered, role, feature_acts, special_ids)
    own = kept >= rendered.start
    tokens = trace_tokens(
        judge,
        rendered.ids[rendered.start :],
        decode,
        positions=kept[own] - rendered.start,
        logits=judged.logits[own],
        feature_acts=feature_acts[kept[own]],
        top=top,
    )
    return Trace(tokens=tokens, score=replace(score, seen=_seen(feature_acts, kept)))


def trace_tokens(
    judge: Judge,
    ids: Sequence[int],
    decode: Callable[[list[int]], str],
    *,
    positions: npt.NDArray[np.int64],
    logits: Floats,
    feature_acts: Floats,
    segments: npt.NDArray[np.int64] | None = None,
    top: int | None = None,
) -> tuple[TraceToken, ...]:
    """All of `ids`, of which k have been judged: their positions and segments (k,), logits (k, D), activations (k, F).

    top: features of a token; None for all that are active.
    """
    row_of = {position: row for row, position in enumerate(positions.tolist())}
    tokens = []
    for position, (token, text) in enumerate(zip(ids, token_texts(ids, decode), strict=True)):
        row = row_of.get(position)
        known = () if row is None else zip(judge.domains, logits[row].tolist(), strict=True)
        tokens.append(
            TraceToken(
                index=position,
                token_id=token,
                text=text,
                observed=row is not None,
                scores={domain: sigmoid(logit) for domain, logit in known},
                features=() if row is None else active_features(judge, feature_acts[row], top),
                segment=None if row is None or segments is None else int(segments[row]),
            )
        )
    return tuple(tokens)


def active_features(
    judge: Judge, acts: Floats, top: int | None = None, *, streaming: bool = False
) -> tuple[FeatureHit, ...]:
    """The features active on one token (F,), strongest first, whatever the domain; `top` of them, or all.

    A contribution is the largest to any domain's logit; streaming: as heads for responses count it.
    """
    heads = judge.streaming_heads if streaming else judge.heads
    active = np.flatnonzero(acts > 0)
    order = active[np.argsort(-acts[active], kind="stable")][:top].tolist()
    largest = (heads.clip(acts)[:, None] * heads.weight).max(1)
    return tuple(judge.hit(i, acts, largest) for i in order)


def _seen(feature_acts: Floats, positions: npt.NDArray[np.int64]) -> Acts:
    return Acts(np.zeros_like(positions), feature_acts[positions])  # one message, one segment


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
