"""What every architecture shares while it is being trained: parameters, normalisation, dead features, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from feature_bank.errors import DataError
from feature_bank.sae import SAE
from training.architectures.initialisation import Centre, centre_of, data_norm, unit_rows
from training.replicas import ALONE, Replicas


class StepStats(NamedTuple):
    """What one step saw: fraction of variance unexplained, mean active features, share of dead features."""

    fvu: float
    l0: float
    dead_fraction: float


class ArchitectureOptions(BaseModel):
    """What an architecture lets its user choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    b_dec_init: Centre = "mean"
    """Where b_dec starts: at the data's mean or its geometric median."""


@dataclass(kw_only=True, eq=False)
class Architecture(ABC):
    """A sparse autoencoder in training.

    Inputs are divided by `norm` (the data's root mean squared length over sqrt(d_in)) so that one learning rate
    serves every layer; `export` folds it back. Everything lives where the sample of `create` lives, in float32, or in
    float64 if the sample is. Inside `torch.autocast` the encoder's product is computed in the lower precision.

    Losses are d_out times the fraction of variance unexplained, and penalties in proportion: their gradients are longer
    than the usual clip of 1 all along, so that every step weighs the same in Adam's averages, early or late. Left at
    the fraction, whose gradients shrink as training goes on, it learns measurably slower.

    The encoder is held feature-major, as `W_enc_T`: its gradient arises in that order, and every parameter stays
    contiguous, as fused optimisers and checkpoints want them.
    """

    name: ClassVar[str]
    Options: ClassVar[type[ArchitectureOptions]]

    options: Any
    W_enc_T: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    norm: float
    dead_after_tokens: int
    tokens_since_fired: Int[Tensor, " d_sae"] = field(init=False)
    replicas: Replicas = field(default=ALONE, init=False)
    """The processes that train this SAE: `gradients` is given one's part of the batch."""

    def __post_init__(self) -> None:
        self.tokens_since_fired = torch.zeros(self.d_sae, dtype=torch.long, device=self.W_dec.device)

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
        """Initialise from a sample of the data: b_dec at its centre, unit-norm random decoder, encoder its transpose.

        Raises DataError for a sample that cannot be scaled, or options that do not fit.
        """
        if target_sample is not None or hook_name_out is not None:
            raise DataError(
                f"architecture {cls.name!r} reconstructs its input, but was given the target {hook_name_out!r}; "
                "use skip_transcoder"
            )
        options = cls._checked(options, d_sae)
        norm = data_norm(sample)
        scaled = _floating(sample) / norm
        W_dec = unit_rows(d_sae, sample.shape[1], seed=seed, like=scaled)
        sae = cls(
            options=options,
            W_enc_T=W_dec.clone(),
            W_dec=W_dec,
            b_dec=centre_of(scaled, options.b_dec_init),
            norm=norm,
            dead_after_tokens=dead_after_tokens,
        )
        sae._prepare(scaled)
        return sae

    @classmethod
    def _checked(cls, options: ArchitectureOptions | None, d_sae: int) -> Any:
        """The options, the defaults if there are none. Raises DataError naming the field that does not fit."""
        if d_sae < 1:
            raise DataError(f"d_sae is {d_sae}; an SAE has at least one feature")
        chosen = cls.Options() if options is None else options
        if not isinstance(chosen, cls.Options):
            raise DataError(
                f"architecture {cls.name!r} takes {cls.Options.__name__}, but was given {type(chosen).__name__}"
            )
        k = getattr(chosen, "k", None)
        if k is not None and k > d_sae:
            raise DataError(f"option 'k' of {cls.name!r} is {k}, but there are only {d_sae} features; lower it")
        return chosen

    def _prepare(self, scaled: Float[Tensor, "n d_in"]) -> None:  # noqa: B027  # few architectures need it
        """Set what else depends on the data, given the normalised sample."""

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return int(self.W_enc_T.shape[1])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.W_dec.shape[0])

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # noqa: N802  # SAELens' name
        """The encoder as SAELens has it: a view, so that writing to it changes the parameter."""
        return self.W_enc_T.T

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser changes, contiguous, by SAELens' names; `W_enc_T` is W_enc's transpose."""

    @abstractmethod
    def gradients(
        self,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"] | None = None,
        progress: float = 1.0,
    ) -> tuple[dict[str, Tensor], StepStats]:
        """The loss's gradient at every parameter, and what the step saw.

        Of several replicas each gives the part of the gradient that its rows have in the whole batch's, and the figures
        of the whole batch.

        Also advances what is counted over steps (dead features, thresholds): call it once a step.
        progress: share of the training that is done, for the penalties' warm-up.
        """

    @abstractmethod
    def export(self, hook_name: str) -> SAE:
        """The SAE for use, input normalisation folded in. Its tensors are copies."""

    def renormalise(self) -> None:
        """Put the decoder's rows back on the unit sphere after an optimiser step."""
        self.W_dec /= torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min_(1e-8)

    def buffers(self) -> dict[str, Tensor]:
        """Everything besides the parameters that the next step depends on."""
        return {
            "tokens_since_fired": self.tokens_since_fired.clone(),
            "norm": torch.tensor(self.norm, dtype=torch.float64),
        }

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Take over what `buffers` gave. Raises DataError for a name that is missing or a shape that differs."""
        for name, own in self.buffers().items():
            found = buffers.get(name)
            if found is None or found.shape != own.shape:
                shape = None if found is None else tuple(found.shape)
                raise DataError(f"buffer {name!r} of {self.name!r} has shape {shape}, expected {tuple(own.shape)}")
        self.tokens_since_fired = buffers["tokens_since_fired"].to(self.tokens_since_fired, copy=True)
        self.norm = float(buffers["norm"])

    def _advance_clocks(self, fired: Bool[Tensor, " d_sae"], batch: int) -> Int[Tensor, " dead"]:
        """Count the tokens since each feature fired; returns the dead ones."""
        self.tokens_since_fired += batch
        self.tokens_since_fired.masked_fill_(fired, 0)
        return torch.nonzero(self.tokens_since_fired > self.dead_after_tokens).squeeze(1)


def _floating(sample: Tensor) -> Tensor:
    return sample if sample.dtype == torch.float64 else sample.float()


def variance_of(centred: Float[Tensor, "rows d"], replicas: Replicas = ALONE) -> Float[Tensor, ""]:
    """The whole batch's sum of squared distances from its mean, given the rows that are here.

    `centred` should lie near zero for the sake of precision.
    """
    rows = replicas.rows(centred.shape[0])
    around_zero, mean = replicas.sums(
        torch.linalg.vector_norm(centred).square(), centred.mean(0) * (centred.shape[0] / rows)
    )
    of_mean: Tensor = torch.linalg.vector_norm(mean).square()
    return (around_zero - rows * of_mean).clamp_min(1e-12)


def project(grad: Float[Tensor, "d_sae d_out"], W_dec: Tensor, radial: Float[Tensor, " d_sae"]) -> None:
    """Take the radial part off the decoder's gradient, in place: the rows stay on the unit sphere."""
    grad.addcmul_(W_dec, radial[:, None], value=-1)
