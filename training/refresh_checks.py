"""The next version against the present one: on texts that were never fitted on, on held-out marks, on live traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from feature_bank.schema import HeadRecord, Pooling
from training.calibration import BoolArray
from training.corpus import OWN_SOURCE, Document
from training.discovery import auroc_interval
from training.evaluation import measure
from training.refresh_heads import Doubles, Form, forms_of, score
from training.refresh_marks import Items
from training.refresh_texts import Ints, Texts

__all__ = ["check_fixed", "check_items", "problems_of", "share"]

FORMS = ("whole", "streaming")
GATED_RATES = ("0.01", "0.05")  # at one in a thousand a handful of texts would decide
AUROC = "auroc"


def check_fixed(
    documents: Sequence[Document],
    texts: Texts,
    before: Mapping[str, HeadRecord],
    after: Mapping[str, HeadRecord],
    pooling: Pooling,
    position: dict[str, int],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """By domain and form: how well either version ranks the texts, and what its own thresholds do to them.

    Every figure is `{"before", "after"}`, each with a 95 % interval; what the texts cannot show is left out.
    """
    found: dict[str, Any] = {}
    for domain in before:
        rows = np.array([i for i, d in enumerate(documents) if d.label(domain) is not None], dtype=np.int64)
        y = np.array([bool(documents[i].label(domain)) for i in rows.tolist()], dtype=np.bool_)
        hard = np.array([_is_twin(documents[i], domain) for i in rows.tolist()], dtype=np.bool_) & ~y
        if not len(rows):
            continue
        pairs = zip(
            forms_of(before[domain], pooling, position), forms_of(after[domain], pooling, position), strict=True
        )
        forms = {}
        for name, (old, new) in zip(FORMS, pairs, strict=True):
            sides = [_measured(form, score(form, texts)[rows], y, hard, seed) for form in (old, new)]
            forms[name] = {key: {"before": sides[0][key], "after": sides[1][key]} for key in sides[0]}
        found[domain] = {"texts": len(y), "positives": int(y.sum()), "hard_negatives": int(hard.sum()), **forms}
    return found


def _is_twin(document: Document, domain: str) -> bool:
    """Whether one of the project's texts was written for this domain's pairs: its ids say so."""
    return document.source == OWN_SOURCE and domain[:4] in document.id


def _measured(form: Form, scores: Doubles, y: BoolArray, hard: BoolArray, seed: int) -> dict[str, Any]:
    probabilities = form.probabilities(scores)
    found: dict[str, Any] = {}
    if y.any() and not y.all():
        ranked = np.where(np.isfinite(scores), scores, -1e9)
        area = auroc_interval(ranked, y, seed=seed)
        found[AUROC] = {"value": area.value, "low": area.low, "high": area.high}
        for rate, value in measure(y.tolist(), ranked.tolist()).tpr_at_fpr.items():
            found[f"ranked_tpr_{rate}"] = {"value": value}
    for rate, threshold in form.thresholds.items():
        reached = probabilities >= threshold
        for name, members in (("tpr", y), ("fpr", ~y), ("hard", hard)):
            if members.any():
                found[f"{name}_{rate}"] = share(reached[members])
    return found


def share(reached: BoolArray) -> dict[str, Any]:
    """A share with Wilson's 95 % interval; None of nothing."""
    n = len(reached)
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    p, z = float(reached.mean()), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return {"value": p, "low": max(0.0, centre - margin), "high": min(1.0, centre + margin), "n": n}


def check_items(
    items: Items,
    unmarked: Items,
    before: Mapping[str, HeadRecord],
    after: Mapping[str, HeadRecord],
    pooling: Pooling,
    position: dict[str, int],
    *,
    rate: str,
) -> dict[str, Any]:
    """By domain, at the thresholds of `rate`, each item in the form that judged it: how many marked items either
    version has right, fitted on and held out, and on what share of unmarked ones the versions decide differently."""
    found: dict[str, Any] = {}
    for domain in before:
        forms = [forms_of(heads[domain], pooling, position) for heads in (before, after)]
        decided = [_decided(pair, items, rate) for pair in forms]
        marks: dict[str, Any] = {}
        for side, held_out in (("fit", False), ("held_out", True)):
            places = items.of(domain, held_out=held_out)
            truth = items.truth(domain, places)
            for name, members in (("false_positives", ~truth), ("positives", truth)):
                chosen = places[members]
                right = [(decision[chosen] == (name == "positives")) for decision in decided]
                marks.setdefault(name, {})[side] = {
                    "marked": len(chosen),
                    "right_before": int(right[0].sum()),
                    "right_after": int(right[1].sum()),
                    "share_after": share(right[1]),
                    "wrong_items": [items.ids[place] for place in chosen[~right[1]].tolist()][:100],
                }
        live = [_decided(pair, unmarked, rate) for pair in forms]
        found[domain] = {"marks": marks, "changed_decisions": share(live[0] != live[1])}
    return found


def _decided(forms: tuple[Form, Form], items: Items, rate: str) -> BoolArray:
    """(n,) which items reach the threshold."""
    reached = np.zeros(len(items), dtype=np.bool_)
    for form in forms:
        if rate in form.thresholds:
            mine: Ints = np.flatnonzero(items.streamed == form.streaming)
            scores = score(form, items.texts.choose(mine))
            reached[mine] = form.probabilities(scores) >= form.thresholds[rate]
    return reached


def problems_of(fixed: Mapping[str, Mapping[str, Any]], fresh: Mapping[str, Any], *, margin: float) -> list[str]:
    """What speaks against the next version, a sentence each: a fall of AUROC or true-positive rate by more than the
    margin on a fixed set, and marked texts that were fitted on and are not mended."""
    found = []
    for name, domains in fixed.items():
        for domain, measured in domains.items():
            for form in FORMS:
                for key in (AUROC, *(f"tpr_{rate}" for rate in GATED_RATES)):
                    pair = measured[form].get(key)
                    if pair is None:
                        continue
                    old, new = pair["before"]["value"], pair["after"]["value"]
                    if old - new > margin + 1e-9:
                        what = "AUROC" if key == AUROC else f"the true-positive rate at {key.removeprefix('tpr_')}"
                        found.append(
                            f"{domain}, {form} texts of {name}: {what} falls by {old - new:.4f}, from {old:.4f} to "
                            f"{new:.4f}; {margin:g} is allowed"
                        )
    for domain, measured in fresh.items():
        for name, sides in measured["marks"].items():
            side = sides["fit"]
            wrong = side["marked"] - side["right_after"]
            if wrong:
                what = "false positives still reach" if name == "false_positives" else "positives do not reach"
                found.append(f"{domain}: {wrong} of {side['marked']} marked {what} the threshold")
    return found
