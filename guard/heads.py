"""The bank's domain heads as matrices on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from feature_bank.bank import Bank


class DomainHeads:
    """Linear heads with their calibration folded in: features (n, F) -> evidence (n, D); averaged, plus bias
    = logits.

    allowed: of a domain, the places of features that are not to raise its score; where one lowers it, it still does.
    streaming: as they are for a response that is judged token by token.
    """

    def __init__(
        self, bank: Bank, allowed: Mapping[str, Sequence[int]] | None = None, *, streaming: bool = False
    ) -> None:
        self.domains = tuple(bank.heads)
        self.pooling = bank.pooling.streamed if streaming else bank.pooling
        position = {feature.id: i for i, feature in enumerate(bank.features)}
        self.weight: npt.NDArray[np.float32] = np.zeros((len(bank.features), len(self.domains)), dtype=np.float32)
        """(F, D)"""
        self.bias: npt.NDArray[np.float32] = np.zeros(len(self.domains), dtype=np.float32)
        """(D,)"""
        for column, domain in enumerate(self.domains):
            head = bank.heads[domain]
            fitted = head.streaming if streaming and head.streaming is not None else head
            slope = fitted.calibration.slope
            for feature, value in zip(head.features, fitted.weights, strict=True):
                self.weight[position[feature], column] = slope * value
            places = list((allowed or {}).get(domain, ()))
            self.weight[places, column] = np.minimum(self.weight[places, column], 0.0)
            self.bias[column] = slope * fitted.bias + fitted.calibration.intercept

    def clip(self, feature_acts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Activations (n, F) as they are averaged, so that no single spike decides."""
        return np.minimum(feature_acts, np.float32(self.pooling.ceiling))

    def evidence(self, feature_acts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(n, D) what each token of (n, F) adds to the moving average of each domain."""
        found: npt.NDArray[np.float32] = self.clip(feature_acts) @ self.weight
        return found
