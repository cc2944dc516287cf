"""The sparse autoencoder as both sides know it: weights, encode, decode, row selection.

Every SAE is kept in one of two forms. In the JumpReLU form a feature fires above a threshold of its own, so a
subset of the rows gives exactly the activations of the whole; ReLU (threshold zero), Gated (`fold_gated`) and
BatchTopK (one threshold for all) are cases of it. In the TopK form (`k` is set) an activation depends on the whole
dictionary; `with_threshold` gives the JumpReLU SAE that stands for it.
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
    """A sparse autoencoder (or transcoder) on one hook point, with SAELens' field names.

    encode: a = z * 1[z > threshold], z = (x - b_dec * apply_b_dec_to_input) @ W_enc + b_enc   (arXiv 2407.14435);
            with `k` only the k largest z of a token fire, of those above threshold   (arXiv 2406.04093)
    decode: y = a @ W_dec + b_dec; a skip transcoder adds x @ W_skip   (arXiv 2501.18823)
    Any input normalisation has been folded into the weights. d_out is d_in unless it is a transcoder.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]
    hook_name: str
    apply_b_dec_to_input: bool = True
    k: int | None = None
    """Per token at most so many features fire; None: as many as are above their threshold."""
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """The affine skip of a transcoder, from its input straight to its output."""
    hook_name_out: str | None = None
    """The hook point that a transcoder predicts; None: the SAE reconstructs `hook_name`."""
    encoder_only: bool = False
    """No decoder was published: `W_dec` holds unit-length encoder directions in its place. It encodes; it refuses to
    decode."""

    def __post_init__(self) -> None:
        if self.W_enc.dim() != 2:
            raise BankError(f"shape {tuple(self.W_enc.shape)} is not (d_in, d_sae)", field="W_enc")
        d_in, d_sae = self.W_enc.shape
        d_out = d_in
        if self.hook_name_out is not None:
            if self.W_dec.dim() != 2:
                raise BankError(f"shape {tuple(self.W_dec.shape)} is not (d_sae, d_out)", field="W_dec")
            d_out = self.W_dec.shape[1]
        expected = {
            "W_dec": (d_sae, d_out),
            "b_enc": (d_sae,),
            "b_dec": (d_out,),
            "threshold": (d_sae,),
            "W_skip": (d_in, d_out),
        }
        for field, shape in expected.items():
            tensor = getattr(self, field)
            if tensor is not None and tuple(tensor.shape) != shape:
                found = tuple(tensor.shape)
                raise BankError(f"shape {found} does not fit W_enc {(d_in, d_sae)}; expected {shape}", field=field)
        if self.k is not None and not 1 <= self.k <= d_sae:
            raise BankError(f"{self.k} is not between 1 and the {d_sae} features", field="k")
        if self.hook_name_out is None and self.W_skip is not None:
            raise BankError("a skip is part of a transcoder; name its hook_name_out", field="W_skip")
        if self.hook_name_out is not None and self.apply_b_dec_to_input:
            raise BankError(
                "a transcoder's b_dec belongs to its output; it cannot be subtracted from the input",
                field="apply_b_dec_to_input",
            )
        if bool((self.threshold < 0).any()):
            # Below zero z * 1[z > threshold] would be negative, which no reader of these files expects.
            raise BankError("a threshold is negative; clamp it to zero, where ReLU cuts", field="threshold")

    @property
    def d_in(self) -> int:
        """Width of the hook point's activation."""
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.W_enc.shape[1])

    @property
    def d_out(self) -> int:
        """Width of what is predicted: `d_in` unless it is a transcoder."""
        return int(self.W_dec.shape[1])

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another activation than the one it reads."""
        return self.hook_name_out is not None

    def encode(self, sae_in: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Feature activations, never negative: 0 at or below threshold, and with `k` for all but the k largest."""
        x = sae_in.to(self.W_enc.dtype)
        if self.apply_b_dec_to_input:
            x = x - self.b_dec
        pre = x @ self.W_enc + self.b_enc
        if self.k is None:
            return pre * (pre > self.threshold)
        pre = torch.where(pre > self.threshold, pre, 0.0)
        values, indices = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, values)

    def folded_encoder(self) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"]]:
        """Encoder weight and bias with the subtraction of `b_dec` absorbed into the bias."""
        if not self.apply_b_dec_to_input:
            return self.W_enc, self.b_enc
        return self.W_enc, self.b_enc - self.b_dec @ self.W_enc

    def rows(self) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """Weight, bias (as `folded_encoder` gives them) and threshold: all there is to any one feature.

        Raises BankError for the TopK form, in which a feature cannot be computed alone.
        """
        if self.k is not None:
            raise BankError(
                "which features of a TopK SAE fire depends on all of them; give it thresholds first (with_threshold)",
                field="k",
            )
        return *self.folded_encoder(), self.threshold

    def decode(self, feature_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_out"]:
        """What the features alone say of the output: `sae_out`, less the skip of a skip transcoder.

        Raises BankError for an SAE of which only the encoder was published.
        """
        if self.encoder_only:
            raise BankError(
                "only the encoder of this SAE was published; it can encode, but neither reconstruct nor steer",
                field="W_dec",
            )
        return feature_acts @ self.W_dec + self.b_dec

    def reconstruct(self, sae_in: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """`sae_out`: the reconstruction of `sae_in`, or a transcoder's prediction from it, skip included.

        Raises BankError as `decode` does.
        """
        sae_out = self.decode(self.encode(sae_in))
        if self.W_skip is None:
            return sae_out
        return sae_out + sae_in.to(self.W_skip.dtype) @ self.W_skip

    def with_threshold(self, threshold: float | Float[Tensor, " d_sae"]) -> SAE:
        """The JumpReLU form with this threshold (one for all, or one a feature) in place of the old one and of `k`.

        Raises BankError for a wrong shape or a negative value.
        """
        value = torch.as_tensor(threshold, dtype=self.threshold.dtype, device=self.threshold.device)
        if value.dim() == 0:
            value = value.expand(self.d_sae).clone()
        return replace(self, threshold=value, k=None)

    def select(self, indices: Sequence[int]) -> SAE:
        """The SAE restricted to the features `indices`, in that order; `encode` of it equals those columns of
        the whole.

        Raises BankError for an index outside the dictionary, or if it is in TopK form.
        """
        weight, bias, threshold = self.rows()
        bad = [i for i in indices if not 0 <= i < self.d_sae]
        if bad:
            raise BankError(f"feature {bad[0]} is outside the dictionary of {self.d_sae} features", field="indices")
        chosen = torch.as_tensor(list(indices), dtype=torch.long)
        return replace(
            self,
            W_enc=weight[:, chosen].clone(),
            W_dec=self.W_dec[chosen].clone(),
            b_enc=bias[chosen].clone(),
            threshold=threshold[chosen].clone(),
            apply_b_dec_to_input=False,
        )


def fold_gated(
    W_enc: Float[Tensor, "d_in d_sae"],
    b_gate: Float[Tensor, " d_sae"],
    b_mag: Float[Tensor, " d_sae"],
    r_mag: Float[Tensor, " d_sae"],
) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """`W_enc`, `b_enc` and `threshold` of the JumpReLU encoder that equals a gated one (arXiv 2404.16014).

    A gated feature is 1[p + b_gate > 0] * ReLU(p * exp(r_mag) + b_mag) with p = x @ W_enc. In terms of the
    magnitude z = p * exp(r_mag) + b_mag the gate is open when z > b_mag - b_gate * exp(r_mag).
    """
    scale = r_mag.exp()
    return W_enc * scale, b_mag, (b_mag - b_gate * scale).clamp_min(0.0)
