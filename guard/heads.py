"""The bank's domain heads as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.bank import Bank


class DomainHeads:
    """Linear heads with their calibration folded in: features (n, F) -> evidence (n, D); averaged, plus bias
    = logits.

    allowed: of a domain, the places of features that are not to raise its score; where one lowers it, it still does.
    streaming: as they are for a response that is judged token by token.
    """

    def __init__(
        self,
        bank: Bank,
        device: torch.device,
        allowed: Mapping[str, Sequence[int]] | None = None,
        *,
        streaming: bool = False,
    ) -> None:
        self.domains = tuple(bank.heads)
        self.pooling = bank.pooling.streamed if streaming else bank.pooling
        position = {feature.id: i for i, feature in enumerate(bank.features)}
        weight = torch.zeros(len(bank.features), len(self.domains))
        bias = torch.zeros(len(self.domains))
        for column, domain in enumerate(self.domains):
            head = bank.heads[domain]
            fitted = head.streaming if streaming and head.streaming is not None else head
            slope = fitted.calibration.slope
            for feature, value in zip(head.features, fitted.weights, strict=True):
                weight[position[feature], column] = slope * value
            places = list((allowed or {}).get(domain, ()))
            weight[places, column] = weight[places, column].clamp_max(0.0)
            bias[column] = slope * fitted.bias + fitted.calibration.intercept
        self.weight: Float[Tensor, "F D"] = weight.to(device)
        self.bias: Float[Tensor, " D"] = bias.to(device)
        self.offset: npt.NDArray[np.float32] = bias.numpy()
        """(D,): the bias again, on the host."""

    def evidence(self, feature_acts: Float[Tensor, "n F"]) -> Float[Tensor, "n D"]:
        """What each token adds to the moving average of each domain."""
        return feature_acts.clamp_max(self.pooling.ceiling) @ self.weight
