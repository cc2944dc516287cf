"""What detectors make of a source they were not fitted on: each source of positives is left out in turn.

Everything happens on fitting rows. A detector is fitted on the discovery split without the source, and judged on all of
the source's rows together with the other sources' negatives from the splits that it did not see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.baselines import LAYERS, Progress, measures, probe, tfidf_classifier, vectorizer
from benchmarks.results import Figure
from benchmarks.rows import Floats, Rows
from feature_bank.taxonomy import DOMAINS
from training.corpus import OWN_SOURCE, Document

LEAST = 30  # positives of a source worth an AUROC
Index = npt.NDArray[np.int64]


class Fold(NamedTuple):
    """One source left out: indices into the fitting rows."""

    source: str
    fit: Index
    judged: Index


def folds(documents: list[Document], domain: str) -> Iterator[Fold]:
    """A fold for every source with at least 30 positives, if at least 20 positives of others are left to fit."""
    known = [i for i, d in enumerate(documents) if domain in d.known]
    counts: dict[str, int] = {}
    for i in known:
        counts[documents[i].source] = counts.get(documents[i].source, 0) + (domain in documents[i].domains)
    for source in sorted(s for s, positives in counts.items() if positives >= LEAST):
        fit = [i for i in known if documents[i].source != source and documents[i].split == "discovery"]
        judged = [
            i
            for i in known
            if not documents[i].id.startswith("taxonomy:")  # pairs that the bank's run has no tokens of
            and (
                documents[i].source == source
                or (documents[i].split != "discovery" and domain not in documents[i].domains)
            )
        ]
        if sum(domain in documents[i].domains for i in fit) >= 20:
            yield Fold(source, np.array(fit, dtype=np.int64), np.array(judged, dtype=np.int64))


class RefittedBank:
    """The bank's heads fitted anew on other rows, from the activations and SAEs in a training run's work folder.

    Raises DataError if the folder belongs to another run than that of the shipped preset on `data`.
    """

    def __init__(self, loaded: Any, data: Path, work: Path) -> None:
        from feature_bank.identity import identify
        from training.directions import document_means
        from training.packing import pool_hooks
        from training.pipeline import load_preset, prepare

        self.preset = load_preset("smollm2-135m")
        model, tokenizer, model_id = loaded

        def report(stage: str, done: int, total: int, detail: str) -> None:
            if done == total:
                print(f"{stage}: {detail}", flush=True)

        run = prepare(
            model=model,
            tokenizer=tokenizer,
            identity=identify(model, tokenizer, model_id),
            preset=self.preset,
            data=[data / name for name in ("fit.jsonl.gz", "general.jsonl.gz")],
            work=work,
            report=report,
        )
        self.documents, self.cache, self.hooks = run.documents, run.cache, run.hooks
        self.stats, self.pooled = pool_hooks(
            self.hooks, self.cache, len(self.documents), self.preset.pooling, work, report
        )
        self.means = {
            name: document_means(self.cache.activations(name), self.cache.documents, len(self.documents))
            for name in self.pooled
        }
        self._index = {(d.id, d.role): i for i, d in enumerate(self.documents)}

    def scores(self, domain: str, source: str, documents: list[Document]) -> Floats:
        """The guard's score of `documents` by a head that was fitted without `source`."""
        from training.activations import encode_tokens
        from training.calibration import document_scores
        from training.heads import fit_heads

        held_out = [dataclasses.replace(d, split="test") if d.source == source else d for d in self.documents]
        saes, scales, pooled = self._without(domain, held_out, source)
        head = fit_heads(
            pooled,
            held_out,
            candidates=self.preset.candidates,
            max_features=self.preset.features_per_head,
            report=_silent,
            domains=(domain,),
        )[domain]
        acts, weights = [], []
        for name, sae in saes.items():
            chosen = [(index, w) for (n, index), w in zip(head.features, head.weights, strict=True) if n == name]
            if chosen:
                indices = [index for index, _ in chosen]
                acts.append(encode_tokens(sae, self.cache.activations(name), indices, scales[name]))
                weights += [w for _, w in chosen]
        every = document_scores(
            np.concatenate(acts, axis=1),
            self.cache.documents,
            np.array(weights, dtype=np.float32),
            head.bias,
            self.preset.pooling,
            len(self.documents),
        )
        found: Floats = every[[self._index[d.id, d.role] for d in documents]]
        return found

    def _without(
        self, domain: str, documents: list[Document], source: str
    ) -> tuple[dict[str, Any], dict[str, Floats], dict[str, Any]]:
        """By hook point: the rows that know nothing of `source`, their scales, and their pooled activations.

        The domain's direction is fitted anew. Those of concepts rest on text written for the project, and go with it.
        """
        from training.activations import feature_stats, pool_documents
        from training.directions import domain_directions, with_directions

        saes: dict[str, Any] = {}
        scales: dict[str, Floats] = {}
        pooled: dict[str, Any] = {}
        for hook in self.hooks:
            name = hook.sae.hook_name
            kept = [i for i in range(hook.sae.d_sae) if i < hook.learnt or "/" in hook.direction(i)]
            kept = kept[: hook.learnt] if source == OWN_SOURCE else kept
            part = hook.sae.select(kept)
            saes[name], scales[name], pooled[name] = part, self.stats[name].scale[kept], self.pooled[name][:, kept]
            if not hook.directions:
                continue
            own = with_directions(part, [domain_directions(self.means[name], documents, (domain,))])
            saes[name] = own
            added = own.select(range(part.d_sae, own.d_sae))
            activations = self.cache.activations(name)
            scale = feature_stats(added, activations).scale
            more = pool_documents(
                added, activations, self.cache.documents, len(self.documents), scale, self.preset.pooling
            )
            scales[name] = np.concatenate([scales[name], scale])
            pooled[name] = np.concatenate([pooled[name], more], axis=1)
        return saes, scales, pooled


def _silent(_detail: str, _done: int) -> None:
    """A refit is too short for a line of progress."""


def leave_one_source_out(
    rows: Rows, bank: RefittedBank, X: Floats, probes: Mapping[str, Any], tfidf: Mapping[str, Any]
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Mean AUROC over the sources left out, by domain and detector, and the AUROC of each source.

    X: (fitting rows, layers, d_model). probes, tfidf: by domain, the settings that cross-validation chose.
    """
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {}
    texts = np.array([d.text for d in rows.fit], dtype=object)
    for domain in DOMAINS:
        found: dict[str, dict[str, float]] = {}
        every = list(folds(rows.fit, domain))
        progress = Progress(f"left out for {domain}", len(every))
        for number, (source, fit, judged) in enumerate(every, 1):
            y = np.array([domain in rows.fit[i].domains for i in fit])
            truth = np.array([domain in rows.fit[i].domains for i in judged])
            chosen = probes[domain]["chosen"]
            layer = LAYERS.index(chosen["layer"])
            terms = vectorizer().fit(texts[fit])
            scores = {
                "": bank.scores(domain, source, [rows.fit[i] for i in judged]),
                "_probe": probe(chosen["C"]).fit(X[fit, layer], y).decision_function(X[judged, layer]),
                "_tfidf": tfidf_classifier(tfidf[domain]["C"])
                .fit(terms.transform(texts[fit]), y)
                .decision_function(terms.transform(texts[judged])),
            }
            found[source] = {
                suffix.strip("_") or "bank": round(measures(truth, values)["auroc"], 4)
                for suffix, values in scores.items()
            } | {"rows": len(judged), "positive": int(truth.sum())}
            progress(number)
        detail[domain] = found
        for suffix in ("", "_probe", "_tfidf"):
            mean = float(np.mean([by[suffix.strip("_") or "bank"] for by in found.values()]))
            figures[f"loso_auroc_{domain}{suffix}"] = Figure(value=round(mean, 4), unit="auroc", n=len(found))
    return figures, detail
