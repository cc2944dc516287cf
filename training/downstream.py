"""All figures of SAEs spliced into their model: reconstruction, and what the model's predictions lose.

Names and definitions are those of SAEBench's core evaluation. The model runs as it is, with the reconstruction in place
of the activation at the hook point, and with an ablation in its place:

    ce_loss_score = (ce_loss_with_ablation - ce_loss_with_sae) / (ce_loss_with_ablation - ce_loss_without_sae)
    kl_div_score  = (kl_div_with_ablation - kl_div_with_sae) / kl_div_with_ablation

with KL(model || spliced model). `ce_loss_recovered` is another name of `ce_loss_score`: 1 if nothing is lost, 0 if the
SAE is worth no more than the ablation.

Loss and divergence are averaged over the text's own tokens: special tokens, those of the chat template and padding do
not count, as in SAEBench. Reconstruction and ablation happen at the same positions: the text's own tokens without
attention sinks (`splice_at="content"`; SAEBench's `exclude_special_tokens_from_reconstruction`, but it ablates
everywhere), or every position but padding (`splice_at="all"`; SAEBench's default). Ablation is with zeros, as there, or
with the mean activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from feature_bank.errors import BankError, DataError
from feature_bank.sae import SAE
from guard.capture import Capture, truncated_forward
from guard.hook_points import execution_order
from training.corpus import TokenSequence
from training.quality import ReconstructionMeter, ReconstructionQuality, RowSummary, check_fit, sites
from training.splicing import TokenBatch, content_logits, group_by_length, prediction_losses, spliced

Ablation = Literal["zero", "mean"]
SpliceAt = Literal["content", "all"]
Sites = tuple[str, str]
BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class DownstreamQuality:
    """What splicing one SAE does to the model's predictions, in nats a token."""

    ablation: Ablation
    splice_at: SpliceAt
    ce_tokens: int
    """Positions with a next token, over which the cross-entropy is averaged."""
    kl_tokens: int
    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_ablation: float
    kl_div_with_sae: float
    kl_div_with_ablation: float

    @property
    def ce_loss_score(self) -> float | None:
        """Share of the ablation's loss that the SAE recovers; None if the ablation costs nothing."""
        cost = self.ce_loss_with_ablation - self.ce_loss_without_sae
        return (self.ce_loss_with_ablation - self.ce_loss_with_sae) / cost if cost else None

    @property
    def ce_loss_recovered(self) -> float | None:
        """`ce_loss_score` by the name that most papers use."""
        return self.ce_loss_score

    @property
    def kl_div_score(self) -> float | None:
        """Share of the ablation's divergence that the SAE avoids; None if the ablation changes nothing."""
        cost = self.kl_div_with_ablation
        return (cost - self.kl_div_with_sae) / cost if cost else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures, the scores among them."""
        scores = ("ce_loss_score", "ce_loss_recovered", "kl_div_score")
        return {**vars(self), **{name: getattr(self, name) for name in scores}}


@dataclass(frozen=True, kw_only=True)
class SaeQuality:
    """All figures of one SAE."""

    name: str
    hook_name: str
    hook_name_out: str | None
    """Where a transcoder's prediction goes; None for an SAE that reconstructs `hook_name`."""
    d_in: int
    d_sae: int
    reconstruction: ReconstructionQuality
    downstream: DownstreamQuality | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures, flat, under SAEBench's names. What is not finite is None."""
        about = {name: getattr(self, name) for name in ("name", "hook_name", "hook_name_out", "d_in", "d_sae")}
        figures = {**self.reconstruction.to_dict(), **(self.downstream.to_dict() if self.downstream else {})}
        broken = {name: None for name, v in figures.items() if isinstance(v, float) and not math.isfinite(v)}
        return {**about, **figures, **broken}


@torch.inference_mode()
def measure_quality(
    model: Any,
    sequences: Sequence[TokenSequence],
    saes: Mapping[str, SAE],
    *,
    ablation: Ablation = "zero",
    splice_at: SpliceAt = "content",
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, SaeQuality]:
    """All figures of several SAEs of one model, by name, on tokenised text that they were not trained on.

    A truncated pass finds the mean activations. In the second pass the model runs once as it is, once ablated for each
    hook point, and once for each SAE. Memory is a batch's logits, twice. `on_batch(done, total)` reports progress.

    Raises DataError for no text or activations that are not finite, BankError for an SAE that does not fit the model.
    """
    if not saes:
        raise DataError("there is no SAE to measure; name at least one")
    groups = group_by_length([s for s in sequences if len(s.positions)], batch_tokens=batch_tokens)
    if not groups:
        raise DataError("no text gives a token to measure on; give more text")
    device = next(model.parameters()).device
    summaries: dict[Sites, RowSummary] = {}
    _check_order(saes)
    for number, members in enumerate(groups, 1):
        _summarise(model, TokenBatch.of(members, device), saes, summaries)
        if on_batch is not None:
            on_batch(number, 2 * len(groups))
    run = _Run(model, saes, summaries, ablation, splice_at)
    for number, members in enumerate(groups, len(groups) + 1):
        run.add(TokenBatch.of(members, device))
        if on_batch is not None:
            on_batch(number, 2 * len(groups))
    return run.results()


def _check_order(saes: Mapping[str, SAE]) -> None:
    for name, sae in saes.items():
        before, after = sites(sae)
        if execution_order(before) > execution_order(after):
            raise BankError(f"{name}: {after} comes before its input {before} in the model", field="hook_name_out")


def _summarise(model: Any, batch: TokenBatch, saes: Mapping[str, SAE], summaries: dict[Sites, RowSummary]) -> None:
    pairs = sorted({sites(sae) for sae in saes.values()})
    hidden = truncated_forward(model, sorted({name for pair in pairs for name in pair}), batch.ids, batch.mask)
    if not summaries:
        for name, sae in saes.items():
            check_fit(name, sae, *(hidden[hook_name].shape[-1] for hook_name in sites(sae)))
    for before, after in pairs:
        target = hidden[after][batch.content]
        summary = summaries.setdefault((before, after), RowSummary(target.shape[1], target.device))
        try:
            summary.add(hidden[before][batch.content], target)
        except DataError as e:
            raise DataError(f"{after}: {e}") from e


class _Run:
    """The second pass: the model as it is, ablated, and with each SAE, over one batch after another."""

    def __init__(
        self,
        model: Any,
        saes: Mapping[str, SAE],
        summaries: Mapping[Sites, RowSummary],
        ablation: Ablation,
        splice_at: SpliceAt,
    ) -> None:
        self._model, self._saes, self._summaries = model, saes, summaries
        self._ablation: Ablation = ablation
        self._splice_at: SpliceAt = splice_at
        self._meters = {name: ReconstructionMeter(sae, summaries[sites(sae)]) for name, sae in saes.items()}
        # Sums of (cross-entropy, divergence): of the model as it is, of each ablated site, of each SAE by its name
        self._clean = torch.zeros(2, dtype=torch.float64)
        self._ablated = {pair: torch.zeros(2, dtype=torch.float64) for pair in summaries}
        self._with_sae = {name: torch.zeros(2, dtype=torch.float64) for name in saes}
        self._ce_tokens = self._kl_tokens = 0

    def add(self, batch: TokenBatch) -> None:
        hidden: dict[str, Tensor] = {}
        hook_names = sorted({name for pair in self._summaries for name in pair})
        with Capture(self._model, hook_names, lambda name, found: hidden.update({name: found})):
            clean = content_logits(self._model, batch)
        self._clean += prediction_losses(clean, None, batch.targets).cpu()
        self._kl_tokens += len(batch.targets)
        self._ce_tokens += int((batch.targets >= 0).sum())

        def losses(hook_name: str, where: Tensor, values: Tensor) -> Tensor:
            with spliced(self._model, hook_name, where, values):
                logits = content_logits(self._model, batch)
            return prediction_losses(logits, clean, batch.targets).cpu()

        chosen = batch.content if self._splice_at == "content" else batch.mask.bool()
        for (before, after), summary in self._summaries.items():
            sae_in, target = hidden[before][chosen], hidden[after][chosen]
            kept = summary.inliers(sae_in) if self._splice_at == "content" else torch.ones_like(sae_in[:, 0]).bool()
            where = chosen.clone()
            where[chosen] = kept
            blank = torch.zeros_like(target) if self._ablation == "zero" else summary.mean().expand_as(target)
            self._ablated[before, after] += losses(after, where, blank[kept])
            for name, meter in self._meters.items():
                if sites(meter.sae) == (before, after):
                    values = meter.add(sae_in, target, batch.content[chosen])
                    self._with_sae[name] += losses(after, where, values[kept])

    def results(self) -> dict[str, SaeQuality]:
        if not self._ce_tokens:
            raise DataError("no text has two tokens in a row, so there is nothing to predict; give longer text")
        return {
            name: SaeQuality(
                name=name,
                hook_name=sae.hook_name,
                hook_name_out=sae.hook_name_out,
                d_in=sae.d_in,
                d_sae=sae.d_sae,
                reconstruction=self._meters[name].result(),
                downstream=self._downstream(self._with_sae[name], self._ablated[sites(sae)]),
            )
            for name, sae in self._saes.items()
        }

    def _downstream(self, with_sae: Tensor, ablated: Tensor) -> DownstreamQuality:
        return DownstreamQuality(
            ablation=self._ablation,
            splice_at=self._splice_at,
            ce_tokens=self._ce_tokens,
            kl_tokens=self._kl_tokens,
            ce_loss_without_sae=float(self._clean[0]) / self._ce_tokens,
            ce_loss_with_sae=float(with_sae[0]) / self._ce_tokens,
            ce_loss_with_ablation=float(ablated[0]) / self._ce_tokens,
            kl_div_with_sae=float(with_sae[1]) / self._kl_tokens,
            kl_div_with_ablation=float(ablated[1]) / self._kl_tokens,
        )
