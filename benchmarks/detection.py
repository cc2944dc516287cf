"""How well sparse heads on the features of one SAE alone detect, on rows that they were not fitted on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.cache import Harvest
from training.corpus import Document, Split, corpus_hash
from training.sweep import Reporter
from training.trainer import TrainedSae

FEATURES = 64  # of a head: as many as the metric of contrast pairs looks at
PARTS = ("held_out", "dev")
DEV: Split = "test"  # of the development rows: nothing is fitted on it
Aurocs = dict[str, dict[str, float]]
"""By part and domain."""


class Run(NamedTuple):
    """What the SAEs are trained on, and what the heads are fitted on."""

    documents: list[Document]
    cache: Harvest


class Detection:
    """Sparse heads on one SAE's features, fitted on the discovery rows, and their AUROC on rows held out."""

    def __init__(self, preset: Any, run: Run, dev: Run, folder: Path, report: Reporter) -> None:
        self.preset, self.run, self.dev, self.folder, self.report = preset, run, dev, folder, report
        self._corpus = corpus_hash(run.documents)

    def measure(self, trained: TrainedSae) -> tuple[Aurocs, dict[str, int]]:
        """AUROC by part and domain, and how many features each domain's head has."""
        from training.activations import cached_pooling
        from training.discovery import auroc, labels
        from training.heads import fit_heads

        sae, hook = trained.load(), trained.run.hook_name
        weights = hashlib.sha256((trained.folder / "sae_weights.safetensors").read_bytes()).hexdigest()
        stats, pooled = cached_pooling(
            sae,
            lambda: self.run.cache.activations(hook),
            self.run.cache.documents,
            len(self.run.documents),
            self.preset.pooling,
            path=self.folder / f"{trained.run.name.replace('/', '--')}.safetensors",
            fingerprint=f"{weights} {self._corpus}",
        )
        heads = fit_heads(
            {hook: pooled},
            self.run.documents,
            candidates=self.preset.candidates,
            max_features=FEATURES,
            report=lambda *_: None,
        )
        found: Aurocs = {part: {} for part in PARTS}
        for domain, head in heads.items():
            columns = [index for _, index in head.features]
            for part, documents, scores in (
                ("held_out", self.run.documents, pooled[:, columns].astype(np.float32) @ head.weights),
                ("dev", self.dev.documents, self._pooled_dev(sae, columns, stats.scale) @ head.weights),
            ):
                rows, y = labels(documents, domain, ("calibration", "test") if part == "held_out" else (DEV,))
                if y.any() and not y.all():
                    found[part][domain] = round(float(auroc(scores[rows], y)[0]), 5)
        self.report("detection", 1, 1, f"{trained.run.name}: {found['dev']}")
        return found, {domain: len(head.features) for domain, head in heads.items()}

    def _pooled_dev(self, sae: Any, columns: list[int], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        from training.activations import pool_documents

        cache, n = self.dev.cache, len(self.dev.documents)
        activations = cache.activations(sae.hook_name)
        own = pool_documents(sae.select(columns), activations, cache.documents, n, scale[columns], self.preset.pooling)
        return own.astype(np.float32)
