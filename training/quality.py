"""How faithfully an SAE reconstructs activations, and how sparsely: the figures of SAEBench's core evaluation.

Names and definitions are SAEBench's (`evals/core`), with these choices where it leaves one or is known to be wrong:

- `explained_variance` is one minus the residual sum of squares over the total sum of squares about the mean of *all*
  counted rows, as in SAELens >= 6 (https://github.com/decoderesearch/SAELens/pull/665); SAEBench 0.6 squares a term
  twice. `fvu` is one minus it. `explained_variance_legacy` is the older mean of each row's own ratio.
- `mse` is the squared length of the residual, averaged over rows. (SAEBench divides it by the batch's rows once more.)
- Means and ratios run over all rows, not over batches, so no figure depends on how rows are cut into batches.

Two passes are made over the rows: the first finds their mean and the length from which a row is an attention sink, the
second the figures. Memory is a few numbers a feature, whatever the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from feature_bank.errors import BankError, DataError
from feature_bank.sae import SAE
from training.batches import OUTLIER_FACTOR

DENSITY_EDGES: tuple[float, ...] = tuple(-8 + i / 4 for i in range(33))
"""Edges of the density histogram, log10 of the share of tokens: quarter decades from 1e-8 to 1."""

_BINS_PER_OCTAVE = 8
_LOWEST_OCTAVE, _OCTAVES = -24, 64
_OUTLIER_BINS = round(math.log2(OUTLIER_FACTOR) * _BINS_PER_OCTAVE)
_CHUNK_VALUES = 2**23  # feature activations held at a time: 32 MB


@dataclass(frozen=True, kw_only=True)
class DensityHistogram:
    """How many features fire how often. `dead` and `counts` together are all features."""

    counts: tuple[int, ...]
    """Features a bin of `DENSITY_EDGES`; a density on an edge belongs to the bin above it, 1 to the last bin."""
    dead: int
    """Features that never fired, for which a log axis has no place."""

    @classmethod
    def of(cls, density: npt.NDArray[np.float64]) -> DensityHistogram:
        """The histogram of densities, (d_sae,) shares of tokens."""
        alive = density[density > 0]
        counts, _ = np.histogram(np.log10(alive).clip(DENSITY_EDGES[0], 0.0), bins=DENSITY_EDGES)
        return cls(counts=tuple(int(n) for n in counts), dead=int(len(density) - len(alive)))


@dataclass(frozen=True, kw_only=True)
class ReconstructionQuality:
    """Figures of one SAE on one set of activations. What these rows cannot show is None."""

    tokens: int
    """Rows that the figures rest on."""
    outlier_tokens: int
    """Rows left out as attention sinks: inputs longer than eight times the median, on which no SAE was trained."""
    explained_variance: float | None
    explained_variance_legacy: float | None
    fvu: float | None
    """Fraction of variance unexplained, 1 - explained_variance."""
    mse: float
    """Mean of |x - x_hat|^2 (summed over dimensions), in squared units of the activation."""
    cossim: float
    """Mean cosine of x and x_hat; 0 where either is zero."""
    l2_norm_in: float
    """Mean length of what is reconstructed."""
    l2_norm_out: float
    """Mean length of the reconstruction."""
    l2_ratio: float
    """Mean of |x_hat| / |x|; below 1 means shrinkage."""
    relative_reconstruction_bias: float | None
    """E|x_hat|^2 / E[x . x_hat], equation 10 of arXiv 2404.16014; 1 is unbiased, below 1 is shrinkage."""
    l0: float
    """Mean number of features active on a row."""
    l1: float
    """Mean sum of a row's absolute feature activations."""
    frac_alive: float
    """Share of features active on at least one row; an underestimate when there are few rows."""
    dead_fraction: float
    """1 - frac_alive."""
    freq_over_1_percent: float
    """Share of features active on more than 1 % of the rows."""
    freq_over_10_percent: float
    feature_density: npt.NDArray[np.float64]
    """(d_sae,) share of the rows on which each feature is active."""
    density_histogram: DensityHistogram

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures; the histogram stands for the density of each feature."""
        plain = asdict(replace(self, feature_density=np.empty(0)))
        del plain["feature_density"]
        plain["density_histogram"]["log10_edges"] = DENSITY_EDGES
        return plain


class RowSummary:
    """What the first pass finds: the mean of the rows that are no attention sinks, and where a sink begins.

    A sink is longer than `OUTLIER_FACTOR` times the median, as in training. Lengths are counted in bins of an eighth of
    an octave, so that the median needs no list of all lengths.
    """

    def __init__(self, d_out: int, device: torch.device | str = "cpu") -> None:
        bins = _OCTAVES * _BINS_PER_OCTAVE
        self._counts = torch.zeros(bins, dtype=torch.int64, device=device)
        self._sums = torch.zeros(bins, d_out, dtype=torch.float64, device=device)

    def add(self, sae_in: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"]) -> None:
        """Take rows in: what the SAE reads, and what it is to reconstruct.

        Raises DataError for NaN or infinity.
        """
        if not bool(torch.isfinite(sae_in).all()) or not bool(torch.isfinite(target).all()):
            raise DataError("the activations hold NaN or infinity; check the model's weights and dtype")
        for part_in, part_out in zip(torch.split(sae_in, 4096), torch.split(target, 4096), strict=True):
            bins = _length_bin(part_in)
            self._counts += torch.bincount(bins, minlength=len(self._counts))
            self._sums.index_add_(0, bins, part_out.double())

    @property
    def tokens(self) -> int:
        """Rows taken in."""
        return int(self._counts.sum())

    def mean(self) -> Float[Tensor, " d_out"]:
        """Mean of the targets, sinks left out, float32."""
        last = self._last_bin() + 1
        mean: Tensor = self._sums[:last].sum(0) / self._counts[:last].sum()
        return mean.float()

    def inliers(self, sae_in: Float[Tensor, "rows d_in"]) -> Bool[Tensor, " rows"]:
        """Which rows are no attention sinks."""
        return _length_bin(sae_in) <= self._last_bin()

    def _last_bin(self) -> int:
        if not self.tokens:
            raise DataError("there is no activation to measure on; give more text")
        median = int((self._counts.cumsum(0) * 2 >= self.tokens).nonzero()[0])
        return median + _OUTLIER_BINS


def _length_bin(rows: Float[Tensor, "rows d"]) -> Int[Tensor, " rows"]:
    octave: Tensor = rows.float().norm(dim=1).log2().clamp(_LOWEST_OCTAVE, _LOWEST_OCTAVE + _OCTAVES - 1e-3)
    scaled: Tensor = (octave - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE
    return scaled.long()


class ReconstructionMeter:
    """The second pass of one SAE: takes rows in, any number at a time, and gives the figures at the end."""

    def __init__(self, sae: SAE, summary: RowSummary) -> None:
        device = summary.mean().device
        self.sae = placed(sae, device)
        self._summary, self._mean = summary, summary.mean()
        self._sums = torch.zeros(11, dtype=torch.float64, device=device)
        self._fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self._tokens = self._outliers = 0

    def add(
        self,
        sae_in: Float[Tensor, "rows d_in"],
        target: Float[Tensor, "rows d_out"],
        counted: Bool[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows d_out"]:
        """Take rows in and return their reconstructions in float32. Rows outside `counted` are only reconstructed."""
        step = max(1, _CHUNK_VALUES // self.sae.d_sae)
        parts = []
        for start in range(0, len(sae_in), step):
            part = slice(start, start + step)
            parts.append(self._add(sae_in[part], target[part], None if counted is None else counted[part]))
        return torch.cat(parts) if parts else target.float()

    def _add(self, sae_in: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        sae_in, target = sae_in.float(), target.float()
        acts = self.sae.encode(sae_in)
        out = self.sae.decode(acts)
        if self.sae.W_skip is not None:  # `reconstruct` without encoding a second time
            out = out + sae_in @ self.sae.W_skip
        inliers = self._summary.inliers(sae_in)
        chosen = inliers if counted is None else inliers & counted
        self._outliers += int((~inliers if counted is None else counted & ~inliers).sum())
        x, x_hat, active = target[chosen], out[chosen], acts[chosen]
        residual = (x - x_hat).pow(2).sum(1)
        variance = (x - self._mean).pow(2).sum(1)
        length, length_hat, dot = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
        columns = (
            residual,
            variance,
            residual / variance,
            length,
            length_hat,
            length_hat / torch.where(length < 1e-4, 1.0, length),  # SAEBench's guard against a zero row
            length_hat.pow(2),
            dot,
            dot / (length * length_hat).clamp_min(torch.finfo(torch.float32).tiny),
            (active != 0).sum(1),
            active.abs().sum(1),
        )
        self._sums += torch.stack([column.double().sum() for column in columns])
        self._fired += (active != 0).sum(0)
        self._tokens += len(x)
        return out

    def result(self) -> ReconstructionQuality:
        """The figures of all rows taken in. Raises DataError if there was none."""
        if not self._tokens:
            raise DataError(f"there is no activation at {self.sae.hook_name} to measure on; give more text")
        n = self._tokens
        residual, variance, legacy, norm_in, norm_out, ratio, square, dot, cosine, l0, l1 = self._sums.tolist()
        density: npt.NDArray[np.float64] = self._fired.cpu().numpy() / n
        alive = float((density > 0).mean())
        fvu = residual / variance if variance > 0 else None
        return ReconstructionQuality(
            tokens=n,
            outlier_tokens=self._outliers,
            explained_variance=None if fvu is None else 1 - fvu,
            explained_variance_legacy=1 - legacy / n if np.isfinite(legacy) else None,
            fvu=fvu,
            mse=residual / n,
            cossim=cosine / n,
            l2_norm_in=norm_in / n,
            l2_norm_out=norm_out / n,
            l2_ratio=ratio / n,
            relative_reconstruction_bias=square / dot if dot != 0 else None,
            l0=l0 / n,
            l1=l1 / n,
            frac_alive=alive,
            dead_fraction=1 - alive,
            freq_over_1_percent=float((density > 0.01).mean()),
            freq_over_10_percent=float((density > 0.1).mean()),
            feature_density=density,
            density_histogram=DensityHistogram.of(density),
        )


def measure_reconstruction(
    saes: Mapping[str, SAE], batches: Callable[[], Iterable[Mapping[str, Float[Tensor, "rows d_in"]]]]
) -> dict[str, ReconstructionQuality]:
    """Figures of several SAEs, by name, on cached activations.

    batches: gives the same rows each time it is called (it is called twice), as tensors by hook point.

    Raises DataError for a missing hook point, no rows, NaN or infinity; BankError if an SAE does not fit their width.
    """
    summaries: dict[tuple[str, str], RowSummary] = {}
    for batch in batches():
        for pair in {sites(sae) for sae in saes.values()}:
            sae_in, target = _rows(batch, pair)
            if pair not in summaries:
                summaries[pair] = RowSummary(target.shape[1], target.device)
            summaries[pair].add(sae_in, target)
    if not summaries:
        raise DataError("there is no activation to measure on; give more text")
    meters = {name: ReconstructionMeter(sae, summaries[sites(sae)]) for name, sae in saes.items()}
    for batch in batches():
        for name, meter in meters.items():
            sae_in, target = _rows(batch, sites(meter.sae))
            check_fit(name, meter.sae, sae_in.shape[1], target.shape[1])
            meter.add(sae_in, target)
    return {name: meter.result() for name, meter in meters.items()}


def _rows(batch: Mapping[str, Tensor], pair: tuple[str, str]) -> tuple[Tensor, Tensor]:
    for hook_name in pair:
        if hook_name not in batch:
            raise DataError(f"there are no activations at {hook_name}; they are there for {', '.join(sorted(batch))}")
    return batch[pair[0]], batch[pair[1]]


def sites(sae: SAE) -> tuple[str, str]:
    """The hook point that an SAE reads and the one that it reconstructs; the same unless it is a transcoder."""
    return sae.hook_name, sae.hook_name_out or sae.hook_name


def check_fit(name: str, sae: SAE, d_in: int, d_out: int) -> None:
    """Raise BankError if the SAE has no decoder, or activations of these widths are not those it reads and gives."""
    if sae.encoder_only:
        raise BankError(f"{name} is an encoder without a decoder; it reconstructs nothing to measure", field="W_dec")
    for field, own, hook_name, found in zip(
        ("d_in", "d_out"), (sae.d_in, sae.d_out), sites(sae), (d_in, d_out), strict=True
    ):
        if own != found:
            raise BankError(
                f"{own} is not the width {found} of {hook_name}; is {name} an SAE of another model?", field=field
            )


def placed(sae: SAE, device: torch.device) -> SAE:
    """The SAE on a device, in float32: figures must not depend on the precision that its file was saved in."""
    changed: dict[str, Any] = {}
    for field in fields(sae):
        value = getattr(sae, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value.to(device, torch.float32)
    return replace(sae, **changed)
