"""What the bank is measured against: a linear probe on raw activations, TF-IDF, and a keyword list."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.keywords import KEYWORDS, count_keywords
from benchmarks.rows import Bools, Floats, Rows, known_labels
from feature_bank.atomic import atomic_file
from feature_bank.taxonomy import DOMAINS
from training.corpus import Document, corpus_hash, tokenise
from training.evaluation import measure

LAYERS = (6, 10, 14, 18, 22)
FIT_TOKENS = 160
CHUNK = 256  # documents between two lines of progress, and in one file of the cache
FPR = 0.01
REGULARISATION = {"probe": (0.001, 0.01, 0.1), "tfidf": (1.0, 10.0)}


def measures(labels: Bools, scores: Floats) -> dict[str, float]:
    """AUROC, AUPRC and the true-positive rate at 1 % and 5 % false positives; empty without both classes."""
    quality = measure(labels.tolist(), scores.tolist())
    found = {
        "auroc": quality.auroc,
        "auprc": quality.auprc,
        "tpr_at_fpr1": quality.tpr_at_fpr["0.01"],
        "tpr_at_fpr5": quality.tpr_at_fpr["0.05"],
    }
    return {name: value for name, value in found.items() if value is not None}


def threshold_at(negatives: Floats, fpr: float, weight: Floats | None = None) -> float:
    """The least of the scores that at most a share `fpr` of the negatives exceeds, weighted like the bank's."""
    if not len(negatives):
        return float("inf")
    order = np.argsort(-negatives, kind="stable")
    share = np.cumsum(np.ones(len(order)) if weight is None else weight[order])
    allowed = int(np.searchsorted(share / share[-1], fpr + 1e-9, side="right"))
    return float(negatives[order[min(allowed, len(order) - 1)]])


def negatives_weight(rows: Rows, known: Any, labels: Bools) -> Floats:
    """(negatives,) what each fitting row without the domain counts among the false positives: as in the bank."""
    from training.calibration import balanced_weights

    weight: Floats = balanced_weights(labels, [rows.fit[i].source for i in known])[~labels]
    return weight


@dataclass(frozen=True, kw_only=True)
class Detected:
    """One detector on the evaluated rows: by domain, scores and whether they pass its 1 % threshold."""

    scores: dict[str, Floats]
    hits: dict[str, Bools]


def pooled(documents: Sequence[Document], loaded: Any, cache: Path, *, max_tokens: int, name: str) -> Floats:
    """(documents, layers, d_model): the residual stream, mean over scored positions; cached by content."""
    import torch

    from guard.capture import pad_batch, truncated_forward

    model, tokenizer, model_id = loaded
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
    cache.mkdir(parents=True, exist_ok=True)
    vectors = np.zeros((len(documents), len(hooks), model.config.hidden_size), dtype=np.float32)
    progress = Progress(f"activations of {name}", len(documents))
    for start in range(0, len(documents), CHUNK):
        chunk = documents[start : start + CHUNK]
        what = f"{corpus_hash(chunk)} {model_id} {model.dtype} {LAYERS} {max_tokens}"
        path = cache / f"pooled-{hashlib.sha256(what.encode()).hexdigest()[:24]}.npz"
        if not path.exists():
            part = vectors[start : start + CHUNK]
            sequences = sorted(tokenise(chunk, tokenizer, max_tokens=max_tokens), key=lambda s: len(s.ids))
            while sequences:  # batches of similar length, at most 64 rows or 4,096 tokens
                size = max(1, min(64, 4096 // len(sequences[min(len(sequences), 64) - 1].ids)))
                batch, sequences = sequences[:size], sequences[size:]
                ids, mask = pad_batch([s.ids for s in batch], 0, next(model.parameters()).device)
                hidden = truncated_forward(model, hooks, ids, mask)
                for row, sequence in enumerate(batch):
                    at = torch.from_numpy(sequence.positions)
                    mean = torch.stack([hidden[hook][row, at].float().mean(0) for hook in hooks])
                    part[sequence.document] = mean.cpu().numpy()
            with atomic_file(path) as tmp, tmp.open("wb") as file:
                np.savez(file, vectors=part)
        with np.load(path) as stored:
            vectors[start : start + CHUNK] = stored["vectors"]
        progress(start + len(chunk))
    return vectors


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A classifier's scores on the evaluated rows, and what cross-validation on the fitting rows says of it."""

    cv_auroc: float
    threshold: float
    """Exceeded by 1 % of the negatives it was fitted on, each scored by a classifier that had not seen it."""
    scores: Floats

    def detect(self, detected: Detected, domain: str) -> None:
        """Enter the scores as those of `domain`."""
        detected.scores[domain] = self.scores
        detected.hits[domain] = self.scores > self.threshold


def fit_classifier(classifier: Any, X: Any, labels: Bools, weight: Floats, X_new: Any) -> Fitted:
    """Score `X` by five-fold cross-validation (fixed seed), fit on all of it, score `X_new`.

    weight: of each negative among the false positives.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    held_out = cross_val_predict(classifier, X, labels, cv=folds, method="decision_function")
    return Fitted(
        cv_auroc=float(roc_auc_score(labels, held_out)),
        threshold=threshold_at(held_out[~labels], FPR, weight),
        scores=classifier.fit(X, labels).decision_function(X_new),
    )


def probe(C: float) -> Any:
    """A classifier of standardised activations."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight="balanced", max_iter=3000))


def score_probe(rows: Rows, X: Floats, X_new: Floats) -> tuple[Detected, dict[str, Any]]:
    """Logistic regression on the mean residual stream; cross-validation chooses layer and strength C.

    X, X_new: (documents, layers, d_model) of the fitting and of the evaluated rows.
    """
    detected = Detected(scores={}, hits={})
    detail: dict[str, Any] = {}
    for domain in DOMAINS:
        known, labels = known_labels(rows.fit, domain)
        weight = negatives_weight(rows, known, labels)
        dev, truth = rows.select(domain, own=False)
        grid = [(layer, C) for layer in LAYERS for C in REGULARISATION["probe"]]
        progress = Progress(f"probes for {domain}", len(grid))
        found: dict[tuple[int, float], Fitted] = {}
        for number, (layer, C) in enumerate(grid, 1):
            i = LAYERS.index(layer)
            found[layer, C] = fit_classifier(probe(C), X[known, i], labels, weight, X_new[:, i])
            progress(number)
        on_dev = {key: measures(truth, fitted.scores[dev]) for key, fitted in found.items()}
        best = {n: max((f.cv_auroc, C) for (layer, C), f in found.items() if layer == n)[1] for n in LAYERS}
        chosen = max(found, key=lambda key: found[key].cv_auroc)
        hindsight = max(found, key=lambda key: on_dev[key].get("auroc", 0.0))
        found[chosen].detect(detected, domain)
        detail[domain] = {
            "chosen": {"layer": chosen[0], "C": chosen[1]},
            "best_on_dev": {"layer": hindsight[0], "C": hindsight[1], **rounded(on_dev[hindsight])},
            "layers": {
                str(layer): {"C": C, "cv_auroc": round(found[layer, C].cv_auroc, 4), **rounded(on_dev[layer, C])}
                for layer, C in best.items()
            },
        }
    return detected, detail


def vectorizer() -> Any:
    """TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)


def tfidf_classifier(C: float) -> Any:
    """A classifier of TF-IDF vectors."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=C, class_weight="balanced", max_iter=3000)


def score_tfidf(rows: Rows) -> tuple[Detected, dict[str, Any]]:
    """Logistic regression on TF-IDF; cross-validation chooses its strength C."""
    terms = vectorizer()
    X = terms.fit_transform([d.text for d in rows.fit])
    X_new = terms.transform([d.text for d in rows.evaluated])
    detected = Detected(scores={}, hits={})
    detail: dict[str, Any] = {}
    progress = Progress("TF-IDF", len(DOMAINS))
    for number, domain in enumerate(DOMAINS, 1):
        known, labels = known_labels(rows.fit, domain)
        weight = negatives_weight(rows, known, labels)
        found = {}
        for C in REGULARISATION["tfidf"]:
            found[C] = fit_classifier(tfidf_classifier(C), X[known], labels, weight, X_new)
        chosen = max(found, key=lambda C: found[C].cv_auroc)
        found[chosen].detect(detected, domain)
        detail[domain] = {"C": chosen, "cv_auroc": round(found[chosen].cv_auroc, 4), "terms": X.shape[1]}
        progress(number)
    return detected, detail


def score_keywords(rows: Rows) -> tuple[Detected, dict[str, Any]]:
    """Counted keywords; nothing is learnt but the threshold."""
    detected = Detected(scores={}, hits={})
    detail: dict[str, Any] = {}
    for domain in DOMAINS:
        known, labels = known_labels(rows.fit, domain)
        weight = negatives_weight(rows, known, labels)
        counts = np.array([count_keywords(rows.fit[i].text, domain) for i in known], dtype=float)
        threshold = threshold_at(counts[~labels], FPR, weight)
        detected.scores[domain] = np.array([count_keywords(d.text, domain) for d in rows.evaluated], dtype=float)
        detected.hits[domain] = detected.scores[domain] > threshold
        detail[domain] = {"words": len(KEYWORDS[domain]), "blocks_above": threshold}
    return detected, detail


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


class Progress:
    """Lines on stderr: what is done, and about how long the rest will take."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.started = name, total, time.monotonic()

    def __call__(self, done: int) -> None:
        left = (time.monotonic() - self.started) / done * (self.total - done)
        print(f"{self.name}: {done}/{self.total}, {left:.0f} s left", file=sys.stderr, flush=True)
