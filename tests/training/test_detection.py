"""What single features detect: planted ones above their null, look-alikes counted, chance ones left out."""

from __future__ import annotations

import numpy as np

from tests.training.samples import document
from training.contrast import ContrastTexts, HardRow
from training.corpus import OWN_SOURCE, Document
from training.detection import detected, detection_scores

N = 400


def corpus() -> list[Document]:
    """Half of the documents belong to violence, a quarter to terror; of the rest some were written for the project."""
    found = []
    for i in range(N):
        domains = ["violence"] if i % 2 == 0 else ["terror"] if i % 4 == 1 else []
        own = i % 8 == 3
        found.append(
            document(
                f"text {i}",
                domains=domains,
                known=["violence", "terror"],
                source=OWN_SOURCE if own else "elsewhere",
                split="discovery",
            )
        )
    return found


def hard_texts() -> ContrastTexts:
    texts = [document(f"hard {i}", known=["violence"], source=OWN_SOURCE, split="discovery") for i in range(10)]
    return ContrastTexts(documents=texts, pairs=[], hard=[HardRow("violence", "assault", i) for i in range(10)])


def test_a_planted_feature_detects_its_domain_and_the_others_nothing() -> None:
    documents = corpus()
    generator = np.random.default_rng(0)
    pooled = generator.random((N, 30)).astype(np.float32)
    pooled[[i for i, d in enumerate(documents) if "violence" in d.domains], 0] += 2
    on_hard = np.zeros((10, 30), dtype=np.float32)
    on_hard[:4, 0] = 5  # four of ten look-alikes set it off
    scores = detection_scores(pooled, documents, on_hard, hard_texts(), seed=0)
    assert set(scores[0]) >= {"auroc_violence", "auroc_violence_low", "auroc_violence_high", "auroc_violence_null"}
    assert scores[0]["auroc_violence"] == 1.0
    assert scores[0]["selectivity_violence"] == 1.0
    assert scores[0]["tpr_violence"] == 1.0
    own = sum(d.source == OWN_SOURCE for d in documents)
    assert 4 / (own + 10) <= scores[0]["lookalike_fpr_violence"] <= 4 / (own + 10) + 0.1
    found = detected(scores, documents)
    assert found[0] == ["violence"]
    assert sum(map(bool, found[1:])) <= 1


def test_a_domain_without_labels_is_left_out() -> None:
    documents = corpus()
    scores = detection_scores(
        np.random.default_rng(1).random((N, 2)).astype(np.float32),
        documents,
        np.zeros((10, 2), dtype=np.float32),
        hard_texts(),
        seed=0,
    )
    assert not [name for name in scores[0] if "politics" in name or "pornography" in name]
    assert detected([], documents) == []
