"""Skip transcoder: an MLP's output from its input, a sparse part beside an affine one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.errors import DataError
from feature_bank.sae import SAE
from training.architectures.base import ArchitectureOptions, variance_of
from training.architectures.initialisation import centre_of, data_norm, unit_rows
from training.architectures.sparse import SparseOptions
from training.architectures.topk import TopK
from training.kernels import SparseGrads


@dataclass(kw_only=True, eq=False)
class SkipTranscoder(TopK):
    """Skip transcoder (Paulo et al., 2025) with the TopK activation.

    y_hat = topk(x W_enc + b_enc) W_dec + b_dec + x W_skip, with x over `norm` and y over `norm_out`.
    """

    name: ClassVar[str] = "skip_transcoder"
    Options: ClassVar[type[ArchitectureOptions]] = SparseOptions

    norm_out: float
    hook_name_out: str
    W_skip: Float[Tensor, "d_in d_out"] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.W_skip = self.W_dec.new_zeros(self.d_in, self.W_dec.shape[1])

    @classmethod
    def create(
        cls,
        sample: Float[Tensor, "n d_in"],
        *,
        d_sae: int,
        seed: int,
        dead_after_tokens: int,
        options: ArchitectureOptions | None = None,
        target_sample: Float[Tensor, "n d_out"] | None = None,
        hook_name_out: str | None = None,
    ) -> Self:
        """Initialise from samples of input and output: b_dec at the output's centre, W_skip at zero, random directions.

        Raises DataError without a target, for samples that cannot be scaled, or options that do not fit.
        """
        if target_sample is None or hook_name_out is None:
            raise DataError(
                f"architecture {cls.name!r} needs the activations that it shall predict; name hook_name_out"
            )
        chosen = cls._checked(options, d_sae)
        norm, norm_out = data_norm(sample), data_norm(target_sample)
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        scaled = sample.to(dtype) / norm
        W_enc_T = unit_rows(d_sae, sample.shape[1], seed=seed, like=scaled)
        sae = cls(
            options=chosen,
            W_enc_T=W_enc_T,
            W_dec=unit_rows(d_sae, target_sample.shape[1], seed=seed + 1, like=scaled),
            b_dec=centre_of(target_sample.to(dtype) / norm_out, chosen.b_dec_init),
            norm=norm,
            norm_out=norm_out,
            hook_name_out=hook_name_out,
            dead_after_tokens=dead_after_tokens,
        )
        # b_dec lies in the output's space, so the input's centre is taken off by b_enc
        sae.b_enc = -(W_enc_T @ centre_of(scaled, chosen.b_dec_init))
        return sae

    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser changes."""
        return {**super().parameters(), "W_skip": self.W_skip}

    def _inputs(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if target is None:
            raise DataError(f"architecture {self.name!r} was given no target: the activations at {self.hook_name_out}")
        sae_in = x * (1 / self.norm)
        centred = torch.add(-self.b_dec, target, alpha=1 / self.norm_out)
        with torch.autocast(x.device.type, enabled=False):
            return sae_in, torch.addmm(centred, sae_in, self.W_skip, alpha=-1), variance_of(centred, self.replicas)

    def _outer_gradients(self, sae_in: Tensor, grad_out: Tensor, grads: SparseGrads) -> dict[str, Tensor]:  # noqa: ARG002
        with torch.autocast(sae_in.device.type, enabled=False):
            return {"b_dec": grad_out.sum(0), "W_skip": sae_in.T @ grad_out}

    def buffers(self) -> dict[str, Tensor]:
        """Everything besides the parameters that the next step depends on."""
        return {**super().buffers(), "norm_out": torch.tensor(self.norm_out, dtype=torch.float64)}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Take over what `buffers` gave."""
        super().load_buffers(buffers)
        self.norm_out = float(buffers["norm_out"])

    def export(self, hook_name: str) -> SAE:
        """The TopK form with its skip, both normalisations folded in; activations are in units of the output."""
        ratio = self.norm_out / self.norm
        return SAE(
            W_enc=(self.W_enc * ratio).contiguous(),
            W_dec=self.W_dec.clone(),
            b_enc=self.b_enc * self.norm_out,
            b_dec=self.b_dec * self.norm_out,
            threshold=torch.zeros_like(self.b_enc),
            k=self.options.k,
            W_skip=self.W_skip * ratio,
            hook_name=hook_name,
            hook_name_out=self.hook_name_out,
            apply_b_dec_to_input=False,
        )
