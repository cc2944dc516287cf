"""The bank's rows as matrices on the model's device: hidden states in, normalised feature activations out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from feature_bank.bank import Bank


class SelectedEncoder:
    """Encodes only the selected features: cost d_in x n_selected a token and hook point.

    Activations come out divided by each feature's scale (its 99.9th percentile); the division is folded into
    the rows.
    """

    def __init__(self, bank: Bank, device: torch.device) -> None:
        self.hook_names = bank.hook_names
        self.columns: dict[str, slice] = {}
        self.decoder: dict[str, Float[Tensor, "n_selected d_in"]] = {}
        self.scale = torch.tensor([f.scale for f in bank.features], dtype=torch.float32, device=device)
        self._weight: dict[str, Tensor] = {}
        self._bias: dict[str, Tensor] = {}
        thresholds = []
        start = 0
        for name in self.hook_names:
            rows = bank.rows[name]
            columns = slice(start, start + rows.b_enc.shape[0])
            scale = self.scale[columns]
            self._weight[name] = torch.from_numpy(rows.W_enc).to(device) / scale
            self._bias[name] = torch.from_numpy(rows.b_enc).to(device) / scale
            self.decoder[name] = torch.from_numpy(rows.W_dec).to(device)
            thresholds.append(torch.from_numpy(rows.threshold).to(device) / scale)
            self.columns[name] = columns
            start = columns.stop
        self.threshold = torch.cat(thresholds)
        self.n_features = start

    def read(
        self, name: str, sae_in: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n n_selected"], Float[Tensor, "n n_selected"]]:
        """What one hook point's features read, in units of their scales, and their activations: the same, cut off at
        the thresholds."""
        pre = torch.addmm(self._bias[name], sae_in.float(), self._weight[name])
        return pre, self._active(pre.clone(), self.threshold[self.columns[name]])

    def stored(self, name: str, columns: Int[Tensor, " k"]) -> Float[Tensor, "d_in k"]:
        """Encoder rows of some of a hook point's features as they were stored, not divided by the scales."""
        return self._weight[name][:, columns] * self.scale[self.columns[name]][columns]

    def encode(self, sae_ins: Mapping[str, Float[Tensor, "n d_in"]]) -> Float[Tensor, "n n_features"]:
        """Normalised activations of all features, in the bank's order."""
        parts = [torch.addmm(self._bias[name], sae_ins[name].float(), self._weight[name]) for name in self.columns]
        return self._active(torch.cat(parts, dim=1), self.threshold)

    @staticmethod
    def _active(pre: Float[Tensor, "n f"], threshold: Float[Tensor, " f"]) -> Float[Tensor, "n f"]:
        return pre.masked_fill_(pre <= threshold, 0.0)  # in this order NaN stays NaN and is noticed
