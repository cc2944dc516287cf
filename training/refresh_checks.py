"""The next version against the present one: on texts that were never fitted on, on held-out marks, on live traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from feature_bank.bank import Bank
from feature_bank.intervals import wilson
from feature_bank.schema import HeadRecord, Pooling
from training.calibration import BoolArray
from training.corpus import OWN_SOURCE, Document
from training.discovery import auroc_interval
from training.evaluation import measure
from training.refresh_heads import Doubles, Form, forms_of, score
from training.refresh_marks import Items
from training.refresh_texts import Ints, Texts

__all__ = ["Version", "check_fixed", "check_items", "problems_of", "share"]

FORMS = ("whole", "streaming")
GATED_RATES = ("0.01", "0.05")  # at one in a thousand a handful of texts would decide
AUROC = "auroc"


def _gated() -> dict[str, tuple[str, int]]:
    """By the key of a measured figure, what it is called, and in which direction it is worse."""
    found = {AUROC: ("AUROC", -1)}
    for rate in GATED_RATES:
        found[f"tpr_{rate}"] = (f"the true-positive rate at {rate}", -1)
        found[f"fpr_{rate}"] = (f"the false-positive rate at {rate}", 1)
    return found


@dataclass(frozen=True, kw_only=True)
class Version:
    """What decides in one version of a bank."""

    heads: Mapping[str, HeadRecord]
    pooling: Pooling
    position: dict[str, int]
    """The place of every feature."""

    @classmethod
    def of(cls, bank: Bank) -> Version:
        """As the bank has it."""
        position = {feature.id: place for place, feature in enumerate(bank.features)}
        return cls(heads=bank.heads, pooling=bank.pooling, position=position)

    def forms(self, domain: str) -> tuple[Form, Form]:
        """The domain's head for whole texts, and for responses that stream."""
        return forms_of(self.heads[domain], self.pooling, self.position)


def check_fixed(
    documents: Sequence[Document], before: tuple[Version, Texts], after: tuple[Version, Texts], *, seed: int = 0
) -> dict[str, Any]:
    """By domain and form: how well either version ranks the texts, and what its own thresholds do to them.

    before, after: a version, and the documents as its features see them; domains are those that both have.
    Every figure is `{"before", "after"}`, each with a 95 % interval; what the texts cannot show is left out.
    """
    found: dict[str, Any] = {}
    for domain in _shared(before[0], after[0]):
        rows = np.array([i for i, d in enumerate(documents) if d.label(domain) is not None], dtype=np.int64)
        y = np.array([bool(documents[i].label(domain)) for i in rows.tolist()], dtype=np.bool_)
        hard = np.array([_is_twin(documents[i], domain) for i in rows.tolist()], dtype=np.bool_) & ~y
        if not len(rows):
            continue
        forms = {}
        for place, name in enumerate(FORMS):
            versions = [(version.forms(domain)[place], texts) for version, texts in (before, after)]
            sides = [_measured(form, score(form, texts)[rows], y, hard, seed) for form, texts in versions]
            forms[name] = {key: {"before": sides[0][key], "after": sides[1][key]} for key in sides[0]}
        found[domain] = {"texts": len(y), "positives": int(y.sum()), "hard_negatives": int(hard.sum()), **forms}
    return found


def _shared(before: Version, after: Version) -> list[str]:
    return [domain for domain in before.heads if domain in after.heads]


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
    low, high = wilson(int(reached.sum()), n)
    return {"value": float(reached.mean()), "low": low, "high": high, "n": n}


def check_items(
    before: tuple[Version, Items, Items], after: tuple[Version, Items, Items], *, rate: str, judge: str
) -> dict[str, Any]:
    """By domain, at the thresholds of `rate`, each item in the form that judged it: how many marked items either
    version has right, fitted on and held out, and on what share of unmarked ones the versions decide differently.

    before, after: a version, and the same marked and unmarked items as its features see them. judge: the content hash
    of the bank before. How many of the marked items that it judged were decided otherwise then tells whether rules
    stand at `rate`.
    """
    found: dict[str, Any] = {}
    items = before[1]
    for domain in _shared(before[0], after[0]):
        decided = [_decided(version.forms(domain), marked, rate) for version, marked, _ in (before, after)]
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
        live = [_decided(version.forms(domain), unmarked, rate) for version, _, unmarked in (before, after)]
        served = [place for place in items.of(domain).tolist() if items.judged[place] == judge]
        found[domain] = {
            "marks": marks,
            "served_otherwise": sum(bool(decided[0][place]) != (domain in items.flagged[place]) for place in served),
            "changed_decisions": share(live[0] != live[1]),
        }
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


def problems_of(
    fixed: Mapping[str, Mapping[str, Any]], fresh: Mapping[str, Any], *, margin: float, rate: str
) -> list[str]:
    """What speaks against the next version, a sentence each: on a fixed set a fall of AUROC or of a true-positive rate,
    or a rise of a false-positive rate, by more than the margin; and marked texts that were fitted on and are not
    mended."""
    found = []
    for name, domains in fixed.items():
        for domain, measured in domains.items():
            for form in FORMS:
                for key, (what, worse) in _gated().items():
                    pair = measured[form].get(key)
                    if pair is None:
                        continue
                    old, new = pair["before"]["value"], pair["after"]["value"]
                    if (new - old) * worse > margin + 1e-9:
                        verb = "rises" if worse > 0 else "falls"
                        found.append(
                            f"{domain}, {form} texts of {name}: {what} {verb} by {abs(new - old):.4f}, from {old:.4f} "
                            f"to {new:.4f}; {margin:g} is allowed"
                        )
    for domain, measured in fresh.items():
        for name, sides in measured["marks"].items():
            side = sides["fit"]
            wrong = side["marked"] - side["right_after"]
            if wrong:
                what = "false positives still reach" if name == "false_positives" else "positives do not reach"
                found.append(f"{domain}: {wrong} of {side['marked']} marked {what} the threshold for {rate}")
    return found
