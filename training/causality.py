"""What a feature does, beside what it shows: its ablation's effect on a judge that reads the model's last block.

A head reads the features themselves, so that ablating one moves its own head by construction. The judge therefore
stands behind all of them: per domain a linear probe on the mean activation after the last block, fitted on the
taxonomy's train pairs and hard negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.sae import SAE
from feature_bank.schema import Causality
from feature_bank.taxonomy import DOMAINS, Domain
from guard.capture import Capture, length_batches, pad_batch, skipped_before
from guard.hook_points import parse_hook_name
from training.contrast import MAX_TOKENS, ContrastTexts
from training.corpus import tokenise
from training.discovery import auroc
from training.selected import FeatureKey

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]
TEXTS = 6  # a feature, at most
MIN_TEXTS = 3
_BATCH_TOKENS = 4096
_C = 0.01


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Per domain a linear probe: logit = x @ weight + bias."""

    domains: tuple[Domain, ...]
    weight: FloatArray
    """(d_model, D)"""
    bias: FloatArray
    """(D,)"""
    test_auroc: Mapping[str, float]
    """On the taxonomy's test pairs, which it was not fitted on."""

    def logits(self, x: FloatArray) -> FloatArray:
        """(n, D) of mean activations (n, d_model)."""
        result: FloatArray = x @ self.weight + self.bias
        return result


class TextModel:
    """The model over the contrast texts, with or without a change on the way: mean activation after its last block.

    What the unchanged model has at `hook_names` is kept, n_tokens * d_in floats each, and a changed pass goes on from
    there: the blocks before a change are not run again for each feature.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: ContrastTexts, hook_names: Sequence[str] = ()) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._sequences = {s.document: s for s in tokenise(texts.documents, tokenizer, max_tokens=MAX_TOKENS)}
        self._last = f"blocks.{model.config.num_hidden_layers - 1}.hook_resid_post"
        # Within a block there is nothing to go on from
        self._kept: dict[str, dict[int, Tensor]] = {
            name: {} for name in hook_names if parse_hook_name(name).site != "mlp_out"
        }

    @property
    def rows(self) -> list[int]:
        """The texts that have a token to read."""
        return sorted(self._sequences)

    def read(self, rows: Sequence[int], change: Change | None = None) -> Float[FloatArray, "n d_model"]:
        """The mean activation over each text's own tokens, in the order of `rows`."""
        found = np.empty((len(rows), self._model.config.hidden_size), dtype=np.float32)
        for batch in length_batches([len(self._sequences[row].ids) for row in rows], _BATCH_TOKENS):
            found[batch] = self._batch([rows[i] for i in batch], batch, change)
        return found

    @torch.inference_mode()
    def _batch(self, rows: list[int], items: list[int], change: Change | None) -> FloatArray:
        sequences = [self._sequences[row] for row in rows]
        ids, mask = pad_batch([s.ids for s in sequences], 0, self._device)
        kept = None if change is None else self._kept.get(change.hook_name)
        resumed = kept is not None and all(row in kept for row in rows)
        last: list[Tensor] = []

        def observer(name: str, hidden: Tensor) -> Tensor | None:
            changed = None
            if change is None and name in self._kept:
                for row, s, here in zip(rows, sequences, hidden, strict=True):
                    self._kept[name][row] = here[: len(s.ids)].clone()
            elif change is not None and name == change.hook_name:
                if resumed:
                    assert kept is not None
                    hidden = torch.nn.utils.rnn.pad_sequence([kept[row] for row in rows], batch_first=True)
                changed = change.apply(hidden, items)
            if name == self._last:
                last.append(hidden if changed is None else changed)
            return changed

        hooks = dict.fromkeys([*(self._kept if change is None else [change.hook_name]), self._last])
        skipped = skipped_before(self._model, change.hook_name) if change is not None and resumed else nullcontext()
        with Capture(self._model, list(hooks), observer), skipped:
            self._model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        means = [
            last[0][row, torch.from_numpy(s.positions)].float().mean(0).cpu().numpy() for row, s in enumerate(sequences)
        ]
        return np.stack(means)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One feature an item taken out at a hook point, the SAE's error term kept: x -= a_f(x) * W_dec[f]."""

    hook_name: str
    W_enc: Float[Tensor, "items d_in"]
    b_enc: Float[Tensor, " items"]
    threshold: Float[Tensor, " items"]
    W_dec: Float[Tensor, "items d_in"]

    def apply(self, hidden: Float[Tensor, "batch seq d_in"], items: list[int]) -> Float[Tensor, "batch seq d_in"]:
        """The activation without the feature of each row's item."""
        x = hidden.float()
        pre = (x @ self.W_enc[items][:, :, None])[..., 0] + self.b_enc[items][:, None]
        acts = torch.where(pre > self.threshold[items][:, None], pre, 0.0)
        return (x - acts[..., None] * self.W_dec[items][:, None]).to(hidden.dtype)


def fit_judge(reader: TextModel, texts: ContrastTexts) -> tuple[Judge, dict[int, FloatArray]]:
    """The judge, and the mean activation of every text by its row."""
    from sklearn.linear_model import LogisticRegression

    rows = reader.rows
    means = reader.read(rows)
    fit = np.array([texts.documents[row].split != "test" for row in rows])
    weights, biases, quality = [], [], {}
    domains = [domain for domain in DOMAINS if any(domain in texts.documents[row].known for row in rows)]
    centre, spread = means[fit].mean(0), means[fit].std(0) + 1e-3
    for domain in domains:
        # A text of another domain counts as one without this domain: only its own pairs say so outright,
        # but a judge that has seen no other domain would take them all for its own
        y = np.array([domain in texts.documents[row].domains for row in rows])
        fitted = LogisticRegression(C=_C, max_iter=1000, class_weight="balanced").fit(
            (means[fit] - centre) / spread, y[fit]
        )
        weight = (fitted.coef_[0] / spread).astype(np.float32)
        weights.append(weight)
        biases.append(float(fitted.intercept_[0] - centre @ weight))
        if 0 < y[~fit].sum() < (~fit).sum():
            quality[str(domain)] = round(float(auroc(means[~fit] @ weight, y[~fit])[0]), 4)
    judge = Judge(
        domains=tuple(domains),
        weight=np.stack(weights, axis=1),
        bias=np.array(biases, dtype=np.float32),
        test_auroc=quality,
    )
    return judge, dict(zip(rows, means, strict=True))


def ablation_effects(
    reader: TextModel,
    judge: Judge,
    means: Mapping[int, FloatArray],
    saes: Mapping[str, SAE],
    features: Sequence[FeatureKey],
    strongest: Sequence[Sequence[int]],
    report: Progress,
) -> dict[FeatureKey, Causality]:
    """What ablating each feature alone does to the judge's logits, on the texts where it is strongest.

    strongest: per feature the texts on which it fires, the strongest first; the first 6 are read, and a feature that
    has fewer than 3 is missing from the result. The interval is the mean's, mean +- 1.96 standard errors.
    """
    found: dict[FeatureKey, Causality] = {}
    chosen = [list(rows[:TEXTS]) for rows in strongest]
    total = sum(len(rows) for rows in chosen if len(rows) >= MIN_TEXTS)
    done = 0
    for hook_name, sae in saes.items():
        here = [i for i, (name, _) in enumerate(features) if name == hook_name and len(chosen[i]) >= MIN_TEXTS]
        if not here:
            continue
        items = [(i, row) for i in here for row in chosen[i]]
        weight, bias, threshold = sae.rows()
        index = torch.tensor([features[i][1] for i, _ in items])
        change = Change(
            hook_name=hook_name,
            W_enc=weight.T[index],
            b_enc=bias[index],
            threshold=threshold[index],
            W_dec=sae.W_dec[index].float(),
        )
        rows = [row for _, row in items]
        ablated = reader.read(rows, change)
        done += len(rows)
        report(done, total, f"{len(here):,} features at {hook_name}")
        before = np.stack([means[row] for row in rows])
        effect = judge.logits(ablated) - judge.logits(before)
        owner = np.array([i for i, _ in items])
        for i in here:
            found[features[i]] = _summary(effect[owner == i], judge.domains)
    return found


def _summary(effect: FloatArray, domains: Sequence[Domain]) -> Causality:
    mean = effect.mean(0)
    margin = 1.96 * effect.std(0, ddof=1) / len(effect) ** 0.5

    def by_domain(values: FloatArray) -> dict[Domain, float]:
        return {domain: round(float(value), 4) for domain, value in zip(domains, values, strict=True)}

    return Causality(
        texts=len(effect), effects=by_domain(mean), low=by_domain(mean - margin), high=by_domain(mean + margin)
    )


def selective(causality: Causality, domain: Domain) -> bool:
    """Whether the ablation lowers the domain's own score, beyond chance, and by more than it moves any other."""
    own = causality.effects.get(domain)
    if own is None or causality.high[domain] >= 0:
        return False
    return all(abs(value) < -own for name, value in causality.effects.items() if name != domain)
