"""SAEs whose figures are known in advance, texts to measure them on, and both measures of a single SAE."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_bank.sae import SAE
from training.corpus import TokenSequence
from training.downstream import SaeQuality, measure_quality
from training.quality import ReconstructionQuality, measure_reconstruction

HOOK = "blocks.1.hook_resid_post"
MLP = "blocks.2.hook_mlp_out"
WIDTH = 32  # of the tiny model


def identity_sae(hook_name: str = HOOK, width: int = WIDTH) -> SAE:
    """Reconstructs everything: each direction has a feature for its positive and one for its negative side."""
    eye = torch.eye(width)
    return SAE(
        W_enc=torch.cat([eye, -eye], dim=1),
        W_dec=torch.cat([eye, -eye]),
        b_enc=torch.zeros(2 * width),
        b_dec=torch.zeros(width),
        threshold=torch.zeros(2 * width),
        hook_name=hook_name,
    )


def constant_sae(value: Tensor, hook_name: str = HOOK, **fields: Any) -> SAE:
    """Reconstructs the same vector everywhere; no feature ever fires."""
    width = len(value)
    return SAE(
        W_enc=torch.zeros(width, 5),
        W_dec=torch.zeros(5, width),
        b_enc=torch.zeros(5),
        b_dec=value,
        threshold=torch.zeros(5),
        hook_name=hook_name,
        **fields,
    )


def model_sae(hook_name: str = HOOK, seed: int = 1) -> SAE:
    """An SAE of the tiny model's width that reconstructs badly."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(64, WIDTH, generator=generator), dim=1)
    return SAE(
        W_enc=W_dec.T.contiguous(),
        W_dec=W_dec,
        b_enc=torch.zeros(64),
        b_dec=torch.zeros(WIDTH),
        threshold=torch.full((64,), 0.002),
        hook_name=hook_name,
    )


def transcoder(model: Any, hook_name: str = "blocks.2.hook_resid_pre", hook_name_out: str = MLP) -> SAE:
    generator = torch.Generator().manual_seed(3)
    return SAE(
        W_enc=torch.randn(WIDTH, 48, generator=generator),
        W_dec=torch.randn(48, WIDTH, generator=generator),
        b_enc=torch.zeros(48),
        b_dec=torch.zeros(WIDTH),
        threshold=torch.zeros(48),
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        apply_b_dec_to_input=False,
        W_skip=torch.zeros(WIDTH, WIDTH),
    )


def texts(n: int = 9, seed: int = 5) -> list[TokenSequence]:
    """Token sequences of unequal length whose first token is special, as are a few others."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(n):
        ids = generator.integers(3, 260, int(generator.integers(3, 24))).tolist()
        positions = np.array([p for p in range(1, len(ids)) if generator.random() < 0.9 or p == 1])
        found.append(TokenSequence(document=index, ids=[1, *ids[1:]], positions=positions))
    return found


def on_rows(sae: SAE, rows: Tensor, chunk: int = 10_000) -> ReconstructionQuality:
    return measure_reconstruction({"a": sae}, lambda: ({sae.hook_name: part} for part in rows.split(chunk)))["a"]


def in_model(model: Any, sae: SAE, **options: Any) -> SaeQuality:
    return measure_quality(model, texts(), {"a": sae}, **options)["a"]
