"""Supervised directions beside an SAE's features: what linear probes of concepts and domains read, as further features.

An SAE spends its features on what is frequent; a distinction that is rare in its training text falls between them,
though a linear probe finds it. So every hook point gets one direction a concept of the taxonomy and one a domain. As
rows after the SAE's own they are described, judged and admitted like any other feature.

A concept's direction is the linear discriminant of its contrast pairs, w = S^-1 (m_with - (m_twins + m_without) / 2),
over mean activations of texts; S is their covariance, shrunk towards a multiple of the identity (Ledoit and Wolf,
2004; here with a fixed share), m_without the mean over the twins of all concepts. A domain's direction is the weight of
a ridge logistic regression on the labelled documents, classes and sources balanced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.sae import SAE
from feature_bank.taxonomy import DOMAINS
from training.activations import chunks
from training.calibration import balanced_weights
from training.contrast import ContrastTexts
from training.corpus import Document
from training.discovery import labels
from training.harvest import Harvest
from training.selected import TrainedHook

FloatArray = npt.NDArray[np.float32]
SHRINKAGE = 0.5  # of the covariance towards the identity
RIDGE_C = 0.01
LEAST = 20  # labelled documents of each kind, for a domain's direction


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Named directions of one hook point: each fires where x @ weight + bias > 0."""

    names: tuple[str, ...]
    weight: Float[FloatArray, "d_in n"]
    """Of unit length each, like an SAE's rows."""
    bias: Float[FloatArray, " n"]
    decoder: Float[FloatArray, "n d_in"]
    """Along the mean difference, as long as moves x @ weight by one: taking an activation out silences it."""

    @classmethod
    def of(cls, fitted: Mapping[str, tuple[FloatArray, float, FloatArray]], d_in: int) -> Directions:
        """By name: a weight (d_in,) of any length, its bias, and the mean difference (d_in,)."""
        found = cls(
            names=tuple(fitted),
            weight=np.zeros((d_in, len(fitted)), dtype=np.float32),
            bias=np.zeros(len(fitted), dtype=np.float32),
            decoder=np.zeros((len(fitted), d_in), dtype=np.float32),
        )
        for i, (weight, bias, difference) in enumerate(fitted.values()):
            length = float(np.linalg.norm(weight))
            found.weight[:, i] = weight / length
            found.bias[i] = bias / length
            found.decoder[i] = difference * length / float(weight @ difference)
        return found


def document_means(
    activations: Float[Tensor, "tokens d_in"], documents: npt.NDArray[np.int64], n_documents: int
) -> Float[FloatArray, "n_documents d_in"]:
    """The mean activation of every document; zeros for one without rows."""
    total = torch.zeros(n_documents, activations.shape[1])
    start = 0
    for chunk in chunks(activations):
        total.index_add_(0, torch.from_numpy(documents[start : start + chunk.shape[0]]), chunk)
        start += chunk.shape[0]
    count = torch.from_numpy(np.bincount(documents, minlength=n_documents)).clamp_min(1)
    means: FloatArray = (total / count[:, None]).numpy()
    return means


def concept_directions(means: FloatArray, on_texts: FloatArray, texts: ContrastTexts) -> Directions:
    """One direction a concept, from its train pairs.

    means: (n_documents, d_in) of a corpus, for the covariance alone. on_texts: the same of the taxonomy's texts.
    """
    pairs = [pair for pair in texts.pairs if pair.split == "train"]
    everything = np.concatenate([means[np.any(means != 0, axis=1)], on_texts])
    covariance = np.cov(everything.T, dtype=np.float64)
    identity = np.eye(len(covariance)) * np.trace(covariance) / len(covariance)
    inverse = np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * identity)
    without = on_texts[[pair.negative for pair in pairs]].mean(0)
    fitted = {}
    for name in dict.fromkeys(f"{pair.domain}/{pair.concept}" for pair in pairs):
        own = [pair for pair in pairs if f"{pair.domain}/{pair.concept}" == name]
        positive = on_texts[[pair.positive for pair in own]].mean(0)
        twins = on_texts[[pair.negative for pair in own]].mean(0)
        difference = positive - (twins + without) / 2
        weight = (inverse @ difference).astype(np.float32)
        fitted[name] = weight, -float(weight @ (positive + without) / 2), difference
    return Directions.of(fitted, on_texts.shape[1])


def domain_directions(means: FloatArray, documents: Sequence[Document], domains: Sequence[str] = DOMAINS) -> Directions:
    """One direction a domain, from the discovery split; none where that has too few labelled documents, or
    they do not differ."""
    from sklearn.linear_model import LogisticRegression

    fitted = {}
    for domain in domains:
        rows, y = labels(documents, domain, ("discovery",))
        if y.sum() < LEAST or (~y).sum() < LEAST:
            continue
        x = means[rows]
        spread = x.std(0) + 1e-3
        model = LogisticRegression(C=RIDGE_C, max_iter=500).fit(
            x / spread, y, sample_weight=balanced_weights(y, [documents[row].source for row in rows])
        )
        weight, difference = (model.coef_[0] / spread).astype(np.float32), x[y].mean(0) - x[~y].mean(0)
        if weight @ difference > 0:
            fitted[domain] = weight, float(model.intercept_[0]), difference
    return Directions.of(fitted, means.shape[1])


def with_directions(sae: SAE, parts: Sequence[Directions]) -> SAE:
    """The SAE with the directions as further rows, in order. Raises BankError for one that is not in JumpReLU form."""
    weight, bias, threshold = sae.rows()
    return replace(
        sae,
        W_enc=torch.cat([weight, *(torch.from_numpy(part.weight).to(weight) for part in parts)], dim=1),
        W_dec=torch.cat([sae.W_dec, *(torch.from_numpy(part.decoder).to(sae.W_dec) for part in parts)]),
        b_enc=torch.cat([bias, *(torch.from_numpy(part.bias).to(bias) for part in parts)]),
        threshold=torch.cat([threshold, *(torch.zeros(len(part.names)).to(threshold) for part in parts)]),
        apply_b_dec_to_input=False,
    )


def add_directions(
    hook: TrainedHook, cache: Harvest, documents: Sequence[Document], texts: ContrastTexts, pairs: Harvest
) -> TrainedHook:
    """The hook point with a direction a domain and a concept as its last rows. pairs: the activations of `texts`."""
    name = hook.sae.hook_name
    means = document_means(cache.activations(name), cache.documents, len(documents))
    on_texts = document_means(pairs.activations(name), pairs.documents, len(texts.documents))
    parts = domain_directions(means, documents), concept_directions(means, on_texts, texts)
    names = tuple(name for part in parts for name in part.names)
    return replace(hook, sae=with_directions(hook.sae, parts), directions=names)
