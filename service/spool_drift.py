"""How far the guarded traffic has moved from the texts that the bank was made with, told from the spool's sample.

Of every domain three figures: how often its rules fire over how often they were set to fire on texts without it, how
often its features are active over how often they were on the bank's corpus, and the population stability index of how
strongly they are, over the bins of the bank's records: 0.1 is a small shift, above 0.25 is a large one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Collection

    from feature_bank.bank import Bank
    from feature_bank.schema import HeadRecord
    from guard.policy import Policy

__all__ = ["Drift", "DriftMetrics"]

_WINDOW = 2000  # items
_MIN_ITEMS = 100
_MIN_ACTIVE = 500  # activations
_RECORDED_BINS = 20  # equal ones from 0 to 1, of which the last takes the rest
_BINS = 10
_LEAST = 1e-4  # of a bin's share, so that an empty one does not decide alone

Counts = npt.NDArray[np.float64]


class DriftMetrics(Protocol):
    """Where the figures are shown; `guard.metrics.Metrics` does it."""

    def set_drift(self, domain: str, *, flag: float | None, firing: float | None, psi: float | None) -> None:
        """Show a domain's figures; what is None is not known yet."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one item adds to the window."""

    tokens: int
    flagged: frozenset[str]
    active: Counts
    """(D, bins) activations by domain and strength."""


class Drift:
    """The window over the sampled items; of one thread."""

    def __init__(self, metrics: DriftMetrics) -> None:
        self._metrics = metrics
        self._version: tuple[str, str] | None = None

    def add(self, bank: Bank, policy: Policy, flagged: Collection[str], acts: npt.NDArray[np.floating]) -> None:
        """Take a sampled item in: the domains that it was flagged for, and the activations (T, F) of its tokens.

        With another bank or policy the window begins anew.
        """
        if self._version != (bank.content_hash, policy.version):
            self._begin(bank, policy)
        active = np.stack([self._strengths(acts[:, columns]) for columns in self._columns])
        self._window.append(_Seen(len(acts), frozenset(flagged), active))
        self._active += active
        self._tokens += len(acts)
        if len(self._window) > _WINDOW:
            oldest = self._window.popleft()
            self._active -= oldest.active
            self._tokens -= oldest.tokens

    def show(self) -> None:
        """Publish the figures of the window."""
        if self._version is None:
            return
        enough = len(self._window) >= _MIN_ITEMS
        for row, domain in enumerate(self._domains):
            flag = firing = psi = None
            expected = self._rates.get(domain)
            if enough and expected:
                flag = len([1 for seen in self._window if domain in seen.flagged]) / len(self._window) / expected
            pairs = self._tokens * len(self._columns[row])
            active = float(self._active[row].sum())
            if enough and pairs and self._densities[row]:
                firing = active / pairs / self._densities[row]
            if enough and active >= _MIN_ACTIVE and self._shares[row].sum():
                psi = _stability(self._active[row] / active, self._shares[row])
            self._metrics.set_drift(domain, flag=flag, firing=firing, psi=psi)

    def _begin(self, bank: Bank, policy: Policy) -> None:
        self._version = bank.content_hash, policy.version
        self._domains = tuple(bank.heads)
        self._rates = {domain: _rate(policy, domain, head) for domain, head in bank.heads.items()}
        self._columns: list[npt.NDArray[np.int64]] = []
        self._densities: list[float] = []
        self._shares: list[Counts] = []
        for domain in self._domains:
            columns = [i for i, feature in enumerate(bank.features) if domain in feature.domains]
            records = [bank.features[i] for i in columns]
            self._columns.append(np.array(columns, dtype=np.int64))
            self._densities.append(sum(record.density for record in records) / max(len(records), 1))
            share = np.zeros(_BINS)
            for record in records:
                if len(record.histogram) == _RECORDED_BINS and any(record.histogram):
                    merged = np.array(record.histogram, dtype=np.float64).reshape(_BINS, -1).sum(1)
                    share += record.density * merged / merged.sum()
            self._shares.append(share / max(float(share.sum()), 1e-12))
        self._window: deque[_Seen] = deque()
        self._active = np.zeros((len(self._domains), _BINS))
        self._tokens = 0

    @staticmethod
    def _strengths(acts: npt.NDArray[np.floating]) -> Counts:
        values = acts[acts > 0]
        bins = np.minimum((values * _BINS).astype(np.int64), _BINS - 1)
        return np.bincount(bins, minlength=_BINS).astype(np.float64)


def _stability(found: Counts, expected: Counts) -> float:
    """The population stability index of two distributions over the same bins."""
    one, other = np.maximum(found, _LEAST), np.maximum(expected, _LEAST)
    return float(((one - other) * np.log(one / other)).sum())


def _rate(policy: Policy, domain: str, head: HeadRecord) -> float | None:
    """The false-positive rate of the laxest of the policy's rules on a domain; None if none of them tells one."""
    rates = []
    for rule in policy.rules:
        threshold = rule.threshold
        if rule.domain != domain or threshold is None:
            continue
        if threshold.fpr is not None:
            rates.append(threshold.fpr)
        elif threshold.probability is not None:
            reached = [float(key) for key, level in head.thresholds.items() if level <= threshold.probability]
            rates.append(min(reached, default=math.nan))
    known = [rate for rate in rates if rate > 0]
    return max(known, default=None)
