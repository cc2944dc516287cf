"""One domain's head from marks and replayed texts: as strong a pull as mends what was marked, and no stronger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.schema import Calibration, HeadRecord, Pooling, StreamingHead
from training.calibration import BoolArray, FloatArray, balanced_weights
from training.corpus import Document
from training.refresh_heads import Doubles, Form, Rows, ends_of, fit_held, forms_of, join_rows, read_rows, score
from training.refresh_marks import Items
from training.refresh_texts import Ints, Texts

__all__ = ["RATE", "Refitted", "Replay", "refit_head"]

RATE = "0.01"  # the false-positive rate at which rules stand unless a policy says otherwise
STRENGTHS = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)  # what a marked text weighs, in replayed texts
# Times the number of replayed texts. As in training, ten times weaker where each text has several windows. These and
# the strengths were chosen with the project's own texts in sight, their test split too: other text is the better judge
RIDGE, STREAMING_RIDGE = 1.0, 0.1
ROUNDS = 3  # fits of one strength: each time the windows that decide now are added
FURTHER = 2  # strengths that are tried from the first on that mends everything clearly
CLEARANCE = 0.5  # of the logit, between a marked text and the threshold: texts like it have to fall on its side, too
SEEN = 5  # replayed negatives above a threshold, from which on their share places the next one
MARKS = "marks"  # as a source beside those of the replayed texts


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Texts with their labels, which hold a head to what it was."""

    documents: Sequence[Document]
    texts: Texts

    def rows(self, *splits: str) -> Ints:
        """The documents of some splits."""
        return np.array([row for row, d in enumerate(self.documents) if d.split in splits], dtype=np.int64)

    def labelled(self, domain: str, rows: Ints) -> tuple[Ints, BoolArray]:
        """Those of the rows whose label is known, and the labels."""
        known = [(row, label) for row in rows.tolist() if (label := self.documents[row].label(domain)) is not None]
        return np.array([row for row, _ in known], dtype=np.int64), np.array([y for _, y in known], dtype=np.bool_)


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """A domain's head, and how it came to be."""

    head: HeadRecord
    changed: bool
    strength: Mapping[str, float]
    """By form, what a marked text weighed in replayed texts; 0 where nothing was learnt."""


def refit_head(
    domain: str,
    head: HeadRecord,
    pooling: Pooling,
    position: dict[str, int],
    *,
    replay: Replay,
    items: Items,
    rejected: frozenset[str],
    rate: str = RATE,
) -> Refitted:
    """The head with its weights fitted again in both forms, recalibrated, with thresholds of its own.

    Where no marked text asks for anything and no feature with a weight was rejected, the head is the same.
    """
    gone = np.array([feature in rejected for feature in head.features])
    columns = np.array([position[feature] for feature in head.features], dtype=np.int64)
    replay = replace(replay, texts=replay.texts.narrow(columns, pooling.ceiling))
    items = replace(items, texts=items.texts.narrow(columns, pooling.ceiling))
    forms, strength = [], {}
    for form in forms_of(head, pooling, position):
        fitted, pull = refit_form(form, domain, replay=replay, items=items, rejected=gone, rate=rate)
        forms.append(fitted)
        strength["streaming" if form.streaming else "whole"] = pull
    whole, streamed = forms
    if not any(strength.values()) and not gone.any():
        return Refitted(head=head, changed=False, strength=strength)
    record = head.model_copy(
        update={
            "weights": _rounded(whole.weights),
            "bias": whole.bias,
            "calibration": whole.calibration,
            "thresholds": whole.thresholds,
            "streaming_thresholds": streamed.thresholds,
            "streaming": StreamingHead(
                weights=_rounded(streamed.weights), bias=streamed.bias, calibration=streamed.calibration
            ),
        }
    )
    return Refitted(head=record, changed=record != head, strength=strength)


def refit_form(
    form: Form, domain: str, *, replay: Replay, items: Items, rejected: BoolArray, rate: str
) -> tuple[Form, float]:
    """One form, and what a marked text weighed.

    Of a few strengths those are kept with which most marked texts that are fitted on come to the right side of the
    threshold of `rate`, clearly if that can be; of these the one that finds most replayed texts of the domain. A pull
    that barely mends leaves marked texts just below one threshold and above the looser ones, which then have to rise.
    Items that the other form judged are pulled at as weakly as can be: their labels hold here, too, but nobody has seen
    this form err on them.
    """
    places = items.of(domain, held_out=False)
    truth = items.truth(domain, places)
    marked = items.texts.choose(places)
    present = form.probabilities(score(form, marked)) >= form.thresholds[rate]
    # What is right already is held as it is, rather than pushed further
    wrong = (present != truth) | items.mistaken(domain, places)
    gone = rejected & (form.weights != 0)
    if not wrong.any() and not gone.any():
        return form, 0.0
    positives, y = replay.labelled(domain, replay.rows("calibration"))
    present_texts = replay.texts.choose(positives[y])
    tried: list[tuple[tuple[int, int, float], Form, float]] = []
    further = FURTHER
    own = items.streamed[places] == form.streaming
    strengths = STRENGTHS if (wrong & own).any() else STRENGTHS[:1] if wrong.any() else (0.0,)
    for strength in strengths:
        fitted = _fit(form, domain, replay, marked, truth, wrong, strength, rejected)
        fitted = recalibrate(form, fitted, domain, replay, marked.choose(np.flatnonzero(~truth & own)))
        probabilities = fitted.probabilities(score(fitted, marked))
        mended = int(((probabilities >= fitted.thresholds[rate]) == truth)[own].sum())
        beyond = _logits(probabilities) - _logits(np.array([fitted.thresholds[rate]]))
        clear = int((np.where(truth, beyond, -beyond) >= CLEARANCE)[own].sum())
        found = fitted.probabilities(score(fitted, present_texts))
        kept = [float((found >= threshold).mean()) for threshold in fitted.thresholds.values() if len(found)]
        tried.append(((mended, clear, float(np.mean(kept)) if kept else 0.0), fitted, strength))
        if clear == int(own.sum()):
            further -= 1
            if not further:
                break
    _, best, pull = max(tried, key=lambda one: one[0])  # the first of equals: the weakest pull
    return best, pull


def _fit(
    form: Form,
    domain: str,
    replay: Replay,
    marked: Texts,
    truth: BoolArray,
    wrong: BoolArray,
    strength: float,
    rejected: BoolArray,
) -> Form:
    held_rows = replay.rows("discovery")
    held = replay.texts.choose(held_rows)
    y = np.array([replay.documents[row].label(domain) is True for row in held_rows.tolist()], dtype=np.bool_)
    sources = [replay.documents[row].source for row in held_rows.tolist()]
    weight = balanced_weights(y, sources).astype(np.float64) if y.any() and not y.all() else np.ones(len(y))
    pull = np.full(len(truth), strength)
    ridge = (STREAMING_RIDGE if form.streaming else RIDGE) * max(len(held_rows), 1)
    fitted = form
    ends = [ends_of(form, held, spread=form.streaming), ends_of(form, marked, spread=form.streaming)]
    for _ in range(ROUNDS):
        now = [
            np.union1d(old, ends_of(fitted, texts, spread=False))
            for old, texts in zip(ends, (held, marked), strict=True)
        ]
        ends = [found.astype(np.int64) for found in now]
        rows = [read_rows(form, held, ends[0], None, weight)]
        rows += _marked_rows(form, fitted, marked, ends[1], truth, wrong, pull)
        fitted = fit_held(form, join_rows(rows), ridge=ridge, rejected=rejected)
    return fitted


def _marked_rows(
    form: Form, fitted: Form, marked: Texts, ends: Ints, truth: BoolArray, wrong: BoolArray, pull: Doubles
) -> list[Rows]:
    """The marked texts' windows: none of a text without the domain may show it, and of one with it the windows that
    show it most have to."""
    text = marked.text[ends]
    peaks = ends_of(fitted, marked, spread=False)
    best: dict[int, tuple[float, int]] = {}
    for end, value in zip(peaks.tolist(), read_rows(fitted, marked, peaks, None, pull).target.tolist(), strict=True):
        best[int(marked.text[end])] = max(best.get(int(marked.text[end]), (-1.0, -1)), (value, end))
    strongest = np.array(sorted(end for place, (_, end) in best.items() if truth[place]), dtype=np.int64)
    negative = ends[~truth[text] & wrong[text]]
    positive = strongest[wrong[marked.text[strongest]]]
    right = ends[~wrong[text]]
    target = truth.astype(np.float64)
    found = []
    for chosen, said in ((negative, target), (positive, target), (right, None)):
        if len(chosen):
            found.append(read_rows(form, marked, chosen, said, pull))
    return found


def recalibrate(before: Form, after: Form, domain: str, replay: Replay, false_positives: Texts) -> Form:
    """The form with a calibration and thresholds for its new scores.

    A probability goes on meaning what it meant: the new scores get the mean and the spread that the present ones have
    on replayed texts. A threshold is the least that at most its rate of the replayed negatives and the marked false
    positives together reach, sources weighing as in training; or no larger a share than of the replayed negatives now,
    where that is more: replayed texts are mostly close look-alikes, and a rate was measured on all kinds of text. Where
    too few of them reach it now to tell, it is at least what it was.
    """
    if after is before:
        return before
    rows, y = replay.labelled(domain, replay.rows("discovery", "calibration"))
    old, new = (score(form, replay.texts)[rows] for form in (before, after))
    seen = np.isfinite(old) & np.isfinite(new)
    calibration = _carried(before.calibration, old[seen], new[seen], y[seen])
    after = replace(after, calibration=calibration)

    negatives = rows[~y]  # of both splits: a share before is compared with a share now, and few rows would blur it
    sources = [replay.documents[row].source for row in negatives.tolist()]
    had, have = (form.probabilities(score(form, replay.texts)[negatives]) for form in (before, after))
    marked = after.probabilities(score(after, false_positives))
    alone = _weights(sources)
    together = _weights([*sources, *[MARKS] * len(marked)])
    pooled = np.concatenate([have, marked])
    found = {}
    for rate, threshold in before.thresholds.items():
        share = float(alone[had >= threshold].sum())
        needed = max(_least(pooled, together, max(float(rate), share)), _least(have, alone, share))
        found[rate] = needed if int((had >= threshold).sum()) >= SEEN else max(threshold, needed)
    return replace(after, thresholds=found)


def _carried(calibration: Calibration, old: Doubles, new: Doubles, y: BoolArray) -> Calibration:
    """The calibration under which the new scores have the mean and spread of the old ones, both classes weighing
    alike."""
    if len(old) < 2:
        return calibration
    weight = np.ones(len(y))
    for side in (True, False):
        weight[y == side] /= max(int((y == side).sum()), 1)
    weight /= weight.sum()
    means = [float(weight @ values) for values in (old, new)]
    spreads = [float(weight @ (v - m) ** 2) ** 0.5 for v, m in zip((old, new), means, strict=True)]
    slope = calibration.slope * (spreads[0] / spreads[1] if min(spreads) > 0 else 1.0)
    return Calibration(slope=slope, intercept=calibration.slope * means[0] + calibration.intercept - slope * means[1])


def _weights(sources: Sequence[str]) -> Doubles:
    """What every negative weighs: a source by the square root of its size; in all 1."""
    if not sources:
        return np.zeros(0)
    weight = balanced_weights(np.zeros(len(sources), dtype=np.bool_), sources).astype(np.float64)
    result: Doubles = weight / weight.sum()
    return result


def _least(probabilities: FloatArray, weight: Doubles, allowed: float) -> float:
    """The least probability that at most this share reaches."""
    order = np.argsort(-probabilities, kind="stable")
    share = np.cumsum(weight[order])
    over = int(np.searchsorted(share, allowed + 1e-9, side="right"))
    if over >= len(order):
        return 0.0
    return min(float(np.nextafter(probabilities[order[over]], np.float32(1.0))), 1.0)


def _logits(probabilities: npt.NDArray[Any]) -> Doubles:
    p = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    logits: Doubles = np.log(p) - np.log1p(-p)
    return logits


def _rounded(weights: Doubles) -> list[float]:
    return [round(float(weight), 6) for weight in weights]
