"""What a feature does, beside what it shows: its ablation's effect on a judge that reads the model's last block.

A head reads the features themselves, so that ablating one moves its own head by construction. The judge therefore
stands behind all of them: per domain a linear probe on the mean activation after the last block, fitted on the
taxonomy's train pairs and hard negatives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from pydantic import TypeAdapter
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
from training.spreading import FLOATS, Spread, Work, here, work_off

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

    @property
    def device(self) -> str:
        """The type of device that the model is on."""
        return str(self._device.type)

    def on(self, device: str) -> TextModel:
        """The same on a type of device: itself if it is there already, else a copy."""
        if device == self.device:
            return self
        found = copy.copy(self)
        found._model = copy.deepcopy(self._model).to(device)
        found._device = next(found._model.parameters()).device
        found._kept = {
            name: {row: hidden.to(found._device) for row, hidden in rows.items()} for name, rows in self._kept.items()
        }
        return found

    def batches(self, rows: Sequence[int]) -> list[list[int]]:
        """The places in `rows` of the texts that are read together."""
        return [list(batch) for batch in length_batches([len(self._sequences[row].ids) for row in rows], _BATCH_TOKENS)]

    def read(self, rows: Sequence[int], change: Change | None = None) -> Float[FloatArray, "n d_model"]:
        """The mean activation over each text's own tokens, in the order of `rows`."""
        found = np.empty((len(rows), self._model.config.hidden_size), dtype=np.float32)
        for batch in self.batches(rows):
            found[batch] = self._batch([rows[i] for i in batch], batch, change)
        return found

    def read_together(self, rows: Sequence[int], change: Change) -> Float[FloatArray, "n d_model"]:
        """`read` in one batch."""
        return self._batch(list(rows), list(range(len(rows))), change)

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

    @classmethod
    def ablating(cls, sae: SAE, features: Sequence[int]) -> Change:
        """Take one of an SAE's features out of each item."""
        weight, bias, threshold = sae.rows()
        index = torch.tensor(features)
        return cls(
            hook_name=sae.hook_name,
            W_enc=weight.T[index],
            b_enc=bias[index],
            threshold=threshold[index],
            W_dec=sae.W_dec[index].float(),
        )

    def apply(self, hidden: Float[Tensor, "batch seq d_in"], items: list[int]) -> Float[Tensor, "batch seq d_in"]:
        """The activation without the feature of each row's item."""
        x = hidden.float()
        W_enc, b_enc, threshold, W_dec = (
            part[items].to(x.device) for part in (self.W_enc, self.b_enc, self.threshold, self.W_dec)
        )
        pre = (x @ W_enc[:, :, None])[..., 0] + b_enc[:, None]
        acts = torch.where(pre > threshold[:, None], pre, 0.0)
        return (x - acts[..., None] * W_dec[:, None]).to(hidden.dtype)


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


@dataclass(frozen=True, kw_only=True)
class Ablated:
    """Texts that are read in one batch, each without one feature."""

    rows: tuple[int, ...]
    change: Change


@dataclass(frozen=True, kw_only=True)
class Ablating(Work[Ablated, list[list[float]]]):
    """The model, and what the judge says of every text as it is."""

    results = TypeAdapter(list[list[float]], config=FLOATS)
    reader: TextModel
    judge: Judge
    means: Mapping[int, FloatArray]
    """By text, (d_model,) its mean activation after the last block."""
    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)

    def on(self, device: str) -> Ablating:
        """The same with the model on a device."""
        return replace(self, reader=self.reader.on(device), device=device)

    def marks(self) -> list[Any]:
        """What the texts give depends on the model: it stands for it."""
        return [self.means, self.judge]

    def do(self, part: Ablated) -> list[list[float]]:
        """By text what the ablation adds to the logit of each domain."""
        before = np.stack([self.means[row] for row in part.rows])
        ablated = self.reader.read_together(part.rows, part.change)
        effect: list[list[float]] = (self.judge.logits(ablated) - self.judge.logits(before)).tolist()
        return effect


def ablation_effects(
    reader: TextModel,
    judge: Judge,
    means: Mapping[int, FloatArray],
    saes: Mapping[str, SAE],
    features: Sequence[FeatureKey],
    strongest: Sequence[Sequence[int]],
    report: Progress,
    *,
    spread: Spread = here,
    kept: Path | None = None,
) -> dict[FeatureKey, Causality]:
    """What ablating each feature alone does to the judge's logits, on the texts where it is strongest.

    strongest: per feature the texts on which it fires, the strongest first; the first 6 are read, and a feature that
    has fewer than 3 is missing from the result. The interval is the mean's, mean +- 1.96 standard errors. spread: who
    reads the texts, batch by batch. kept: see `work_off`.
    """
    chosen = [list(rows[:TEXTS]) for rows in strongest]
    items: list[tuple[int, int]] = []  # (feature, text)
    batches: list[tuple[str, list[int]]] = []  # of items
    for hook_name in saes:
        at = len(items)
        able = [i for i, (name, _) in enumerate(features) if name == hook_name and len(chosen[i]) >= MIN_TEXTS]
        items += [(i, row) for i in able for row in chosen[i]]
        read = reader.batches([row for _, row in items[at:]])
        batches += [(hook_name, [at + place for place in batch]) for batch in read]
    done = 0

    def part(number: int) -> Ablated:
        hook_name, batch = batches[number]
        return Ablated(
            rows=tuple(items[item][1] for item in batch),
            change=Change.ablating(saes[hook_name], [features[items[item][0]][1] for item in batch]),
        )

    def say(number: int) -> None:
        nonlocal done
        done += len(batches[number][1])
        report(done, len(items), f"{len({feature for feature, _ in items}):,} features")

    work = Ablating(reader=reader, judge=judge, means=means, device=reader.device)
    found = work_off(work, len(batches), part, spread=spread, kept=kept, on_part=say)
    effects = np.empty((len(items), len(judge.domains)), dtype=np.float32)
    for (_, batch), effect in zip(batches, found, strict=True):
        effects[batch] = effect
    owner = np.array([feature for feature, _ in items], dtype=np.int64)
    return {features[i]: _summary(effects[owner == i], judge.domains) for i in dict.fromkeys(owner.tolist())}


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
