"""How well the bank detects its domains, beside a linear probe, TF-IDF and a keyword list on the same rows.

    python -m benchmarks.quality --data DIR [--bank FOLDER] [--cache FOLDER] [--docs]

DIR holds `fit.jsonl.gz` and `dev.jsonl.gz`. The baselines are fitted on the first and on the "fit" rows of the
project's own corpora; all are evaluated on the second and on the own "test" rows. The result holds no text.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.keywords import KEYWORDS, count_keywords
from benchmarks.results import RESULTS, Figure, write_result
from feature_bank.atomic import atomic_file
from feature_bank.errors import DataError
from feature_bank.schema import CorpusRecord
from feature_bank.taxonomy import DOMAINS
from training.corpus import OWN_SOURCE, Document, corpus_hash, read_documents, read_rows, tokenise
from training.evaluation import measure

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

LAYERS = (6, 10, 14, 18, 22)
FIT_TOKENS = 160
CHUNK = 256  # documents between two lines of progress, and in one file of the cache
FPR = 0.01
BENIGN_SOURCES = ("clinc-oos", "dolly", "gsm8k", "mt-bench")
SUFFIXES = ("", "_probe", "_tfidf", "_keywords")
REGULARISATION = {"probe": (0.01, 0.1), "tfidf": (1.0, 10.0)}
CORPORA = Path(__file__).parents[1] / "training" / "corpora"


# ---- figures of merit --------------------------------------------------------------------------------------


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


def threshold_at(negatives: Floats, fpr: float) -> float:
    """The least score that at most a share `fpr` of the negatives exceeds."""
    return float(np.quantile(negatives, 1 - fpr, method="higher")) if len(negatives) else float("inf")


def bootstrap_auroc(
    labels: Bools, scores: Mapping[str, Floats], *, repeats: int = 500, seed: int = 0
) -> dict[str, list[float]]:
    """95 % intervals of the AUROC by name, and of the first name's lead over each other (`NAME_lead`).

    Positives and negatives are resampled apart, the same rows for every name.
    """
    from scipy.stats import rankdata

    rng = np.random.default_rng(seed)
    positive, negative = np.flatnonzero(labels), np.flatnonzero(~labels)
    n, m = len(positive), len(negative)
    samples: dict[str, list[float]] = {name: [] for name in scores}
    for _ in range(repeats):
        rows = np.concatenate([rng.choice(positive, n), rng.choice(negative, m)])
        for name, values in scores.items():
            ranks = rankdata(values[rows])
            samples[name].append((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    first, *others = samples
    differences = {f"{o}_lead": np.subtract(samples[first], samples[o]) for o in others}
    drawn: dict[str, Any] = {**samples, **differences}
    return {name: [round(float(q), 4) for q in np.quantile(v, (0.025, 0.975))] for name, v in drawn.items()}


# ---- rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows:
    """`fit` is what the baselines learn from; `evaluated` is dev followed by the own test rows."""

    fit: list[Document]
    evaluated: list[Document]
    is_own: Bools
    records: list[CorpusRecord]

    def select(self, domain: str, *, own: bool, unseen: bool = False) -> tuple[npt.NDArray[np.int64], Bools]:
        """(indices into `evaluated`, labels) of rows with a known label; `unseen`: of sources not in fit."""
        seen = {d.source for d in self.fit}
        rows = [
            i
            for i, d in enumerate(self.evaluated)
            if domain in d.known and bool(self.is_own[i]) == own and not (unseen and d.source in seen)
        ]
        return np.array(rows, dtype=np.int64), np.array([domain in self.evaluated[i].domains for i in rows], dtype=bool)


def read_all(data: Path, limit: int | None, sample: int | None = None) -> Rows:
    """Read everything; `limit` keeps that many rows of each part, `sample` that many of dev alone, chosen by hash."""
    own_files = sorted(CORPORA.glob("*.jsonl"))
    held_out = {row["id"] for path in own_files for _, row in read_rows(path) if row.get("split") == "test"}
    fit, fit_records = read_documents([data / "fit.jsonl.gz"])
    dev, dev_records = read_documents([data / "dev.jsonl.gz"])
    own, own_records = read_documents(own_files)
    own = [d for d in own if d.known]
    learnt = {(d.text, d.role) for d in fit}
    repeats = [d.id for d in dev if (d.text, d.role) in learnt]
    if repeats:
        raise DataError(f"dev.jsonl.gz repeats rows of fit.jsonl.gz, the first with id {repeats[0]!r}; remove them")
    own_fit = _sample([d for d in own if d.id not in held_out], limit)
    own_test = _sample([d for d in own if d.id in held_out], limit)
    dev = _sample(dev, limit if sample is None else sample)
    return Rows(
        fit=_sample(fit, limit) + own_fit,
        evaluated=dev + own_test,
        is_own=np.arange(len(dev) + len(own_test)) >= len(dev),
        records=fit_records + dev_records + own_records,
    )


def _sample(documents: list[Document], limit: int | None) -> list[Document]:
    if limit is None:
        return documents
    return sorted(documents, key=lambda d: hashlib.sha256(d.id.encode()).digest())[:limit]


def known_labels(documents: Sequence[Document], domain: str) -> tuple[npt.NDArray[np.int64], Bools]:
    """(indices of the documents whose label is known, labels)."""
    known = np.array([i for i, d in enumerate(documents) if domain in d.known], dtype=np.int64)
    return known, np.array([domain in documents[i].domains for i in known], dtype=bool)


# ---- detectors ---------------------------------------------------------------------------------------------


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
    progress = _Progress(f"activations of {name}", len(documents))
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


def fit_classifier(classifier: Any, X: Any, labels: Bools, X_new: Any) -> Fitted:
    """Score `X` by five-fold cross-validation (fixed seed), fit on all of it, score `X_new`."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    held_out = cross_val_predict(classifier, X, labels, cv=folds, method="decision_function")
    return Fitted(
        cv_auroc=float(roc_auc_score(labels, held_out)),
        threshold=threshold_at(held_out[~labels], FPR),
        scores=classifier.fit(X, labels).decision_function(X_new),
    )


def score_bank(attached: Any, documents: Sequence[Document]) -> tuple[Detected, list[str]]:
    """The guard's own scores, and the action its policy takes on each document."""
    results = []
    progress = _Progress("guard", len(documents))
    for start in range(0, len(documents), CHUNK):
        chunk = documents[start : start + CHUNK]
        results += attached.score([d.text for d in chunk], [d.role for d in chunk])
        progress(start + len(chunk))
    detected = Detected(
        scores={d: np.array([r.scores[d] for r in results]) for d in DOMAINS},
        hits={d: np.array([r.flagged[d] for r in results]) for d in DOMAINS},
    )
    return detected, [r.action for r in results]


def score_probe(rows: Rows, loaded: Any, cache: Path) -> tuple[Detected, dict[str, Any]]:
    """Logistic regression on the mean residual stream; cross-validation chooses layer and strength C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    context = int(loaded.model.config.max_position_embeddings) - 64  # the chat template's own tokens fit in 64
    X = pooled(rows.fit, loaded, cache, max_tokens=FIT_TOKENS, name="fit")
    X_new = pooled(rows.evaluated, loaded, cache, max_tokens=context, name="dev and own test")
    detected = Detected(scores={}, hits={})
    detail: dict[str, Any] = {}
    for domain in DOMAINS:
        known, labels = known_labels(rows.fit, domain)
        dev, truth = rows.select(domain, own=False)
        grid = [(layer, C) for layer in LAYERS for C in REGULARISATION["probe"]]
        progress = _Progress(f"probes for {domain}", len(grid))
        found: dict[tuple[int, float], Fitted] = {}
        for number, (layer, C) in enumerate(grid, 1):
            logistic = LogisticRegression(C=C, class_weight="balanced", max_iter=3000)
            i = LAYERS.index(layer)
            classifier = make_pipeline(StandardScaler(), logistic)
            found[layer, C] = fit_classifier(classifier, X[known, i], labels, X_new[:, i])
            progress(number)
        on_dev = {key: measures(truth, fitted.scores[dev]) for key, fitted in found.items()}
        best = {n: max((f.cv_auroc, C) for (layer, C), f in found.items() if layer == n)[1] for n in LAYERS}
        chosen = max(found, key=lambda key: found[key].cv_auroc)
        hindsight = max(found, key=lambda key: on_dev[key].get("auroc", 0.0))
        found[chosen].detect(detected, domain)
        detail[domain] = {
            "chosen": {"layer": chosen[0], "C": chosen[1]},
            "best_on_dev": {"layer": hindsight[0], "C": hindsight[1], **_rounded(on_dev[hindsight])},
            "layers": {
                str(layer): {"C": C, "cv_auroc": round(found[layer, C].cv_auroc, 4), **_rounded(on_dev[layer, C])}
                for layer, C in best.items()
            },
        }
    return detected, detail


def score_tfidf(rows: Rows) -> tuple[Detected, dict[str, Any]]:
    """Logistic regression on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    X = vectorizer.fit_transform([d.text for d in rows.fit])
    X_new = vectorizer.transform([d.text for d in rows.evaluated])
    detected = Detected(scores={}, hits={})
    detail: dict[str, Any] = {}
    progress = _Progress("TF-IDF", len(DOMAINS))
    for number, domain in enumerate(DOMAINS, 1):
        known, labels = known_labels(rows.fit, domain)
        found = {}
        for C in REGULARISATION["tfidf"]:
            logistic = LogisticRegression(C=C, class_weight="balanced", max_iter=3000)
            found[C] = fit_classifier(logistic, X[known], labels, X_new)
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
        counts = np.array([count_keywords(rows.fit[i].text, domain) for i in known], dtype=float)
        threshold = threshold_at(counts[~labels], FPR)
        detected.scores[domain] = np.array([count_keywords(d.text, domain) for d in rows.evaluated], dtype=float)
        detected.hits[domain] = detected.scores[domain] > threshold
        detail[domain] = {"words": len(KEYWORDS[domain]), "blocks_above": threshold}
    return detected, detail


# ---- the result --------------------------------------------------------------------------------------------


def summarise(
    rows: Rows, detectors: Mapping[str, Detected], actions: Sequence[str], blocking: frozenset[str]
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Figures and detail of every detector, by suffix. `blocking`: the domains that the policy blocks."""
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {"domains": {}, "sources": [], "operating_points": {}}
    for domain in DOMAINS:
        about: dict[str, Any] = {}
        for part, own, unseen in (("dev", False, False), ("unseen", False, True), ("own", True, False)):
            at, truth = rows.select(domain, own=own, unseen=unseen)
            about[part] = {"rows": len(at), "positive": int(truth.sum())}
            for suffix, detected in detectors.items():
                for name, value in measures(truth, detected.scores[domain][at]).items():
                    if part == "dev" or name == "auroc":
                        figures[f"{part}_{name}_{domain}{suffix}"] = Figure(
                            value=round(value, 4), unit="share" if name.startswith("tpr") else name, n=len(at)
                        )
            if truth.any() and not truth.all():
                scores = {suffix.strip("_") or "bank": d.scores[domain][at] for suffix, d in detectors.items()}
                about[part]["auroc_95"] = bootstrap_auroc(truth, scores)
        detail["domains"][domain] = about
        at, truth = rows.select(domain, own=False)
        detail["operating_points"][domain] = {
            suffix.strip("_") or "bank": operating_point(truth, d.hits[domain][at]) for suffix, d in detectors.items()
        }
        detail["sources"] += _by_source(rows, detectors, domain)

    benign = [
        i for i, d in enumerate(rows.evaluated) if not rows.is_own[i] and d.source in BENIGN_SOURCES and not d.domains
    ]
    hard = [i for i, d in enumerate(rows.evaluated) if rows.is_own[i] and not d.domains]
    for name, chosen in (("benign", benign), ("hard_negative", hard)):
        for suffix, detected in detectors.items():
            if not chosen:
                continue
            flagged = np.any([detected.hits[d][chosen] for d in DOMAINS], axis=0)
            blocked = np.any([detected.hits[d][chosen] for d in sorted(blocking)], axis=0)
            if suffix == "":  # what the policy did, not what its thresholds imply
                blocked = np.array([actions[i] == "block" for i in chosen])
            for what, passed in (("blocked", blocked), ("flagged", flagged)):
                value = round(float(passed.mean()), 4)
                figures[f"{name}_{what}{suffix}"] = Figure(value=value, unit="share", n=len(chosen))
    return figures, detail


def operating_point(truth: Bools, hits: Bools) -> dict[str, float | None]:
    """What a threshold does: true- and false-positive rate, precision; None where nothing is to divide."""
    share = {"tpr": hits[truth], "fpr": hits[~truth], "precision": truth[hits]}
    return {name: round(float(part.mean()), 4) if len(part) else None for name, part in share.items()}


def _by_source(rows: Rows, detectors: Mapping[str, Detected], domain: str) -> list[dict[str, Any]]:
    learnt = {rows.fit[i].source for i in known_labels(rows.fit, domain)[0]}
    table = []
    for own in (False, True):
        at, truth = rows.select(domain, own=own)
        sources = np.array([rows.evaluated[i].source for i in at])
        for source in sorted(set(sources.tolist())):
            here, label = at[sources == source], truth[sources == source]
            table.append(
                {
                    "domain": domain,
                    "source": f"{source} (test)" if source == OWN_SOURCE else source,
                    "in_fit": source in learnt,
                    "rows": len(here),
                    "positive": int(label.sum()),
                    **{
                        suffix.strip("_") or "bank": {
                            **operating_point(label, d.hits[domain][here]),
                            "auroc": _rounded(measures(label, d.scores[domain][here])).get("auroc"),
                        }
                        for suffix, d in detectors.items()
                    },
                }
            )
    return table


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


class _Progress:
    """Lines on stderr: what is done, and about how long the rest will take."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.started = name, total, time.monotonic()

    def __call__(self, done: int) -> None:
        left = (time.monotonic() - self.started) / done * (self.total - done)
        print(f"{self.name}: {done}/{self.total}, {left:.0f} s left", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with fit.jsonl.gz and dev.jsonl.gz")
    parser.add_argument("--bank", type=Path, help="bank folder; the shipped one if left out")
    parser.add_argument("--cache", type=Path, default=Path("runs/quality"), help="folder for pooled activations")
    parser.add_argument("--limit", type=int, help="rows of each part, for a trial; needs --out")
    parser.add_argument("--sample", type=int, help="rows of dev, chosen by hash; all if left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/quality.md")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.out == RESULTS:
        parser.error("--limit is for trials, whose figures are not published; give --out another folder")

    from benchmarks.tables import update
    from guard import Guard, load_model

    rows = read_all(options.data, options.limit, options.sample)
    guard = Guard.from_bank(options.bank)
    loaded = load_model(device="cpu")
    with guard.attach(loaded.model, loaded.tokenizer) as attached:
        bank, actions = score_bank(attached, rows.evaluated)
    probe, probe_detail = score_probe(rows, loaded, options.cache)
    tfidf, tfidf_detail = score_tfidf(rows)
    keywords, keywords_detail = score_keywords(rows)
    blocking = frozenset(rule.domain for rule in guard.policy.rules if rule.action == "block")
    figures, detail = summarise(
        rows, dict(zip(SUFFIXES, (bank, probe, tfidf, keywords), strict=True)), actions, blocking
    )
    detail |= {
        "bank": {
            "version": guard.bank.version,
            "content_hash": guard.bank.content_hash,
            "features": len(guard.bank.features),
            "hook_points": list(guard.bank.hook_names),
        },
        "policy": guard.policy.version,
        "model": loaded.model_id,
        "fitted_rows": len(rows.fit),
        "limit": options.limit,
        "dev_sample": options.sample,
        "corpora": [record.model_dump() for record in rows.records],
        "probe": probe_detail,
        "tfidf": tfidf_detail,
        "keywords": keywords_detail,
    }
    print(write_result("quality", figures, detail, packages=("scikit-learn",), folder=options.out))
    if options.docs:
        update("quality", options.out)


if __name__ == "__main__":
    main()
