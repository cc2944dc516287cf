"""The sparse autoencoder as both sides know it: JumpReLU weights, encode, decode, row selection.

Every trained SAE is kept in this form. A top-k activation depends on the whole dictionary (and, for
BatchTopK, on the batch); a threshold per feature does not, so that a subset of the rows gives exactly the
activations of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.errors import BankError


@dataclass(frozen=True, kw_only=True)
class SAE:
    """A JumpReLU sparse autoencoder on one hook point, with SAELens' field names.

    encode: a = z * 1[z > threshold], z = (x - b_dec * apply_b_dec_to_input) @ W_enc + b_enc
    decode: x_hat = a @ W_dec + b_dec
    Any input normalisation has been folded into the weights.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"]
    hook_name: str
    apply_b_dec_to_input: bool = True

    def __post_init__(self) -> None:
        if self.W_enc.dim() != 2:
            raise BankError(f"shape {tuple(self.W_enc.shape)} is not (d_in, d_sae)", field="W_enc")
        d_in, d_sae = self.W_enc.shape
        expected = {
            "W_dec": (d_sae, d_in),
            "b_enc": (d_sae,),
            "b_dec": (d_in,),
            "threshold": (d_sae,),
        }
        for field, shape in expected.items():
            found = tuple(getattr(self, field).shape)
            if found != shape:
                raise BankError(f"shape {found} does not fit W_enc {(d_in, d_sae)}; expected {shape}", field=field)

    @property
    def d_in(self) -> int:
        """Width of the hook point's activation."""
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.W_enc.shape[1])

    def encode(self, sae_in: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations, in the units of the residual stream along unit-norm decoder rows; 0 below threshold."""
        weight, bias = self.folded_encoder()
        pre = sae_in.to(weight.dtype) @ weight + bias
        return pre * (pre > self.threshold)

    def folded_encoder(self) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"]]:
        """Encoder weight and bias with the subtraction of `b_dec` absorbed into the bias."""
        if not self.apply_b_dec_to_input:
            return self.W_enc, self.b_enc
        return self.W_enc, self.b_enc - self.b_dec @ self.W_enc

    def decode(self, feature_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        """The reconstruction `sae_out` of the hook point's activation."""
        return feature_acts @ self.W_dec + self.b_dec

    def select(self, indices: Sequence[int]) -> SAE:
        """The SAE restricted to the features `indices`, in that order; `encode` of it equals those columns of
        the whole.

        Raises BankError for an index outside the dictionary.
        """
        bad = [i for i in indices if not 0 <= i < self.d_sae]
        if bad:
            raise BankError(f"feature {bad[0]} is outside the dictionary of {self.d_sae} features", field="indices")
        rows = torch.as_tensor(list(indices), dtype=torch.long)
        weight, bias = self.folded_encoder()
        return replace(
            self,
            W_enc=weight[:, rows].clone(),
            W_dec=self.W_dec[rows].clone(),
            b_enc=bias[rows].clone(),
            threshold=self.threshold[rows].clone(),
            apply_b_dec_to_input=False,
        )
