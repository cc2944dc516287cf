"""Who says what a steered answer is about: a probe beside the bank that also knows the model's own writing.

A probe of labelled rows takes most of what this small model writes, and nearly all that breaks down under steering,
for politics. So the judge has read such text as well: answers to harmless requests, as they are and broken by random
vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.baselines import LAYERS, probe
from benchmarks.rows import Bools, Floats, Rows, known_labels
from feature_bank.taxonomy import DOMAINS

LAYER = 18
C = 0.01
FPR = 0.05
OWN_WRITING = 0.25  # what the model's own answers weigh among the negatives
REQUESTS = 96
BATCH_TOKENS = 4096


def harmless_requests(rows: Rows) -> list[str]:
    """Short requests among the fitting rows that are in no domain, chosen by hash."""
    found = [d for d in rows.fit if d.source in ("clinc-oos", "dolly") and d.role == "prompt" and not d.domains]
    short = [d for d in found if len(d.text) < 300]
    return [d.text for d in sorted(short, key=lambda d: hashlib.sha256(d.id.encode()).digest())[:REQUESTS]]


def read_answers(model: Any, tokenizer: Any, texts: Sequence[str]) -> Floats:
    """(n, d_model) mean activation of each text at the judge's layer, read as an answer without its prompt."""
    import torch

    from feature_bank.layout import render, scored_positions
    from guard.capture import length_batches, pad_batch, truncated_forward

    hook = f"blocks.{LAYER}.hook_resid_post"
    rendered = [render(tokenizer, text, "response", max_tokens=256) for text in texts]
    means = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for batch in length_batches([len(r.ids) for r in rendered], BATCH_TOKENS):
        ids, mask = pad_batch([rendered[i].ids for i in batch], 0, torch.device("cpu"))
        hidden = truncated_forward(model, [hook], ids, mask)[hook]
        for row, i in enumerate(batch):
            at = scored_positions(rendered[i], tokenizer.all_special_ids)
            if len(at):
                means[i] = hidden[row, torch.from_numpy(at)].mean(0).numpy()
    return means


class Judge:
    """Per domain a logistic regression on labelled rows and the model's harmless writing, and what it must exceed:
    one in twenty of the negatives that were held out, of either kind."""

    def __init__(self, rows: Rows, X: Floats, writing: Floats) -> None:
        """X: (fitting rows, layers, d_model) mean activations. writing: (n, d_model) of harmless answers."""
        self._probes: dict[str, tuple[Any, float]] = {}
        self.found: dict[str, float] = {}
        """Of positives that were held out, the share that is found."""
        held_out = np.array([hashlib.sha256(d.id.encode()).digest()[0] % 5 == 0 for d in rows.fit])
        later = np.arange(len(writing)) % 2 == 1
        at = LAYERS.index(LAYER)
        for domain in DOMAINS:
            known, y = known_labels(rows.fit, domain)
            own, fit = held_out[known], known[~held_out[known]]
            x = np.concatenate([X[fit, at], writing[~later]])
            truth = np.append(y[~own], np.zeros((~later).sum(), dtype=bool))
            weight = np.ones(len(truth))
            weight[len(fit) :] = OWN_WRITING * (~y[~own]).sum() / (~later).sum()
            fitted = probe(C).fit(x, truth, logisticregression__sample_weight=weight)
            scores = fitted.decision_function(X[known[own], at])
            negatives = (scores[~y[own]], fitted.decision_function(writing[later]))
            threshold = max(float(np.quantile(part, 1 - FPR, method="higher")) for part in negatives)
            self._probes[domain] = fitted, threshold
            self.found[domain] = round(float((scores[y[own]] > threshold).mean()), 4)

    def finds(self, domain: str, means: Floats) -> Bools:
        """(n,) whether answers are in the domain, by `read_answers`."""
        fitted, threshold = self._probes[domain]
        found: Bools = fitted.decision_function(means) > threshold
        return found
