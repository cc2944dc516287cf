"""How well the bank detects its domains, beside a linear probe, TF-IDF and a keyword list on the same rows.

    python -m benchmarks.quality --data DIR [--bank FOLDER] [--cache FOLDER] [--work FOLDER] [--docs]

DIR holds `fit.jsonl.gz` and `dev.jsonl.gz`. The baselines are fitted on the first, on the "fit" rows of the project's
own corpora and on the taxonomy's train pairs, from all of which the bank has learnt; all are evaluated on the second
and on the own "test" rows. With `--work`, the work folder of the training run that made the bank, one source of
positives at a time is left out of the fitting as well. The result holds no text.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baselines import (
    CHUNK,
    FIT_TOKENS,
    Detected,
    Progress,
    measures,
    pooled,
    rounded,
    score_keywords,
    score_probe,
    score_tfidf,
)
from benchmarks.results import RESULTS, Figure, write_result
from benchmarks.rows import Bools, Floats, Rows, contrast_rows, known_labels, read_all
from feature_bank.taxonomy import DOMAINS
from training.corpus import OWN_SOURCE, Document

BENIGN_SOURCES = ("clinc-oos", "dolly", "gsm8k", "mt-bench")
SUFFIXES = ("", "_probe", "_tfidf", "_keywords")


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


def score_bank(attached: Any, documents: Sequence[Document]) -> tuple[Detected, list[str]]:
    """The guard's own scores, and the action its policy takes on each document."""
    results = []
    progress = Progress("guard", len(documents))
    for start in range(0, len(documents), CHUNK):
        chunk = documents[start : start + CHUNK]
        results += attached.score([d.text for d in chunk], [d.role for d in chunk])
        progress(start + len(chunk))
    detected = Detected(
        scores={d: np.array([r.scores[d] for r in results]) for d in DOMAINS},
        hits={d: np.array([r.flagged[d] for r in results]) for d in DOMAINS},
    )
    return detected, [r.action for r in results]


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
                            "auroc": rounded(measures(label, d.scores[domain][here])).get("auroc"),
                        }
                        for suffix, d in detectors.items()
                    },
                }
            )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with fit.jsonl.gz and dev.jsonl.gz")
    parser.add_argument("--bank", type=Path, help="bank folder; the shipped one if left out")
    parser.add_argument("--cache", type=Path, default=Path("runs/quality"), help="folder for pooled activations")
    parser.add_argument("--work", type=Path, help="work folder of the bank's training run, to leave out sources")
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
    rows = replace(rows, fit=[*rows.fit, *([] if options.limit else contrast_rows())])
    guard = Guard.from_bank(options.bank)
    loaded = load_model(device="cpu")
    with guard.attach(loaded.model, loaded.tokenizer) as attached:
        bank, actions = score_bank(attached, rows.evaluated)
    X = pooled(rows.fit, loaded, options.cache, max_tokens=FIT_TOKENS, name="fit")
    context = int(loaded.model.config.max_position_embeddings) - 64  # the chat template's own tokens fit in 64
    X_new = pooled(rows.evaluated, loaded, options.cache, max_tokens=context, name="dev and own test")
    probe, probe_detail = score_probe(rows, X, X_new)
    tfidf, tfidf_detail = score_tfidf(rows)
    keywords, keywords_detail = score_keywords(rows)
    blocking = frozenset(rule.domain for rule in guard.policy.rules if rule.action == "block")
    figures, detail = summarise(
        rows, dict(zip(SUFFIXES, (bank, probe, tfidf, keywords), strict=True)), actions, blocking
    )
    if options.work is not None:
        from benchmarks.leave_one_source_out import RefittedBank, leave_one_source_out

        left_out, detail["leave_one_source_out"] = leave_one_source_out(
            rows, RefittedBank(loaded, options.data, options.work), X, probe_detail, tfidf_detail
        )
        figures |= left_out
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
