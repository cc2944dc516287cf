"""The features that are described and judged one by one: whom a first fit would use, and what they do on the pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_bank.schema import Duplicate, Pooling
from feature_bank.taxonomy import Taxonomy
from training.activations import encode_tokens
from training.contrast import ContrastTexts, inlier_rows
from training.corpus import Document
from training.harvest import Harvest
from training.heads import contrast_rows, fit_heads, mean_difference
from training.selected import FeatureKey, Selection, TrainedHook, feature_id

FloatArray = npt.NDArray[np.float32]
SAME = 0.7  # correlation over tokens from which two features count as near-duplicates
_CHUNK = 65_536


@dataclass(frozen=True, kw_only=True)
class Contrasts:
    """A taxonomy, its texts, and their activations."""

    taxonomy: Taxonomy
    texts: ContrastTexts
    cache: Harvest


@dataclass(frozen=True, kw_only=True)
class ContrastActs:
    """What candidates do on the taxonomy's texts."""

    fired: npt.NDArray[np.bool_]
    """(texts, F): whether it fires on any token but the attention sinks, on which thousands of features fire."""
    peak: FloatArray
    """(texts, F): its largest normalised activation on those."""
    pooled: FloatArray
    """(texts, F): its mean clipped activation, as heads read it."""

    def strongest(self, feature: int, most: int) -> list[int]:
        """The texts on which a feature fires, the strongest first."""
        order = np.argsort(-self.peak[:, feature], kind="stable")[:most]
        return [int(row) for row in order if self.fired[row, feature]]


def choose(
    pooled: Mapping[str, npt.NDArray[np.float16]],
    documents: Sequence[Document],
    scales: Mapping[str, FloatArray],
    *,
    screened: int,
    per_head: int,
    per_steering: int,
    report: Callable[[str, int], None],
) -> list[FeatureKey]:
    """The features of a first fit of every domain's head, and those that carry most of its mean difference."""
    fitted = fit_heads(pooled, documents, candidates=screened, max_features=per_head, report=report)
    keys = {key for head in fitted.values() for key in head.features}
    for domain in fitted:
        positive, negative = contrast_rows(documents, domain)
        for name, matrix in pooled.items():
            carried = np.abs(mean_difference(matrix, positive, negative) * scales[name])
            keys.update((name, int(i)) for i in np.argsort(-carried, kind="stable")[:per_steering])
    return sorted(keys)


def encode(
    hooks: Sequence[TrainedHook], keys: Sequence[FeatureKey], cache: Harvest, scales: Mapping[str, FloatArray]
) -> Selection:
    """The features' activations on every token of a harvest, ordered by hook point and index."""
    ordered = [(hook.sae.hook_name, i) for hook in hooks for i in sorted(i for n, i in keys if n == hook.sae.hook_name)]
    acts = np.empty((cache.tokens, len(ordered)), dtype=np.float16)
    start = 0
    for hook in hooks:
        name = hook.sae.hook_name
        indices = [i for n, i in ordered if n == name]
        if indices:
            acts[:, start : start + len(indices)] = encode_tokens(
                hook.sae, cache.activations(name), indices, scales[name]
            )
            start += len(indices)
    return Selection(keys=ordered, acts=acts)


def on_contrasts(
    hooks: Sequence[TrainedHook],
    keys: Sequence[FeatureKey],
    contrasts: Contrasts,
    scales: Mapping[str, FloatArray],
    pooling: Pooling,
) -> ContrastActs:
    """What the features do on the taxonomy's texts."""
    encoded = encode(hooks, keys, contrasts.cache, scales)
    acts = encoded.acts.astype(np.float32)
    documents = contrasts.cache.documents
    shape = (len(contrasts.texts.documents), acts.shape[1])
    peak, total = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    present = documents[starts]
    total[present] = np.add.reduceat(np.minimum(acts, pooling.ceiling), starts)
    for name in {hook_name for hook_name, _ in encoded.keys}:
        columns = np.array([i for i, (hook_name, _) in enumerate(encoded.keys) if hook_name == name], dtype=np.int64)
        sinks = np.flatnonzero(~inlier_rows(contrasts.cache, name))
        acts[np.ix_(sinks, columns)] = 0.0
    peak[present] = np.maximum.reduceat(acts, starts)
    count = np.bincount(documents, minlength=shape[0])
    mean = total / np.maximum(count, pooling.min_tokens).astype(np.float32)[:, None]
    return ContrastActs(fired=peak > 0, peak=peak, pooled=mean)


def near_duplicates(selection: Selection) -> list[list[Duplicate]]:
    """Per feature, those whose activations correlate with its own at 0.7 or more over all tokens, closest first."""
    n, size = selection.acts.shape
    products = np.zeros((size, size), dtype=np.float64)
    total = np.zeros(size, dtype=np.float64)
    for start in range(0, n, _CHUNK):
        part = sparse.csr_matrix(selection.acts[start : start + _CHUNK].astype(np.float32))
        products += (part.T @ part).toarray()
        total += np.asarray(part.sum(0)).ravel()
    mean = total / n
    covariance = products / n - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    correlation = covariance / np.outer(spread, spread)
    np.fill_diagonal(correlation, 0.0)
    found = []
    for row in correlation:
        order = [i for i in np.argsort(-row, kind="stable")[:8].tolist() if row[i] >= SAME]
        found.append([Duplicate(id=feature_id(selection.keys[i]), correlation=round(float(row[i]), 4)) for i in order])
    return found
