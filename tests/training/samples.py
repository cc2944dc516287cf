"""What the tests of training share: documents, a stand-in for a model that starts at once, and sparse data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feature_bank.sae import SAE
from training.corpus import Document, TokenSequence, split_of
from training.harvest import Harvest, harvest

TOY_HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


class LlamaForCausalLM(nn.Module):
    """Two layers behind the paths of a Llama: enough for the hook table, without the time that a real one takes."""

    def __init__(self, vocabulary: int = 64, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(vocabulary, width, generator=generator))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        hidden = self.embed[input_ids].cumsum(1)  # causal, as attention is
        for layer in self.model.get_submodule("layers").children():
            hidden = torch.tanh(layer(hidden))
        return hidden


def document(text: str, **fields: Any) -> Document:
    """A document with the fields that a test leaves open filled in."""
    name = fields.pop("id", text)
    domains, known = frozenset(fields.pop("domains", ())), frozenset(fields.pop("known", ()))
    defaults = {"role": "passage", "source": "elsewhere", "licence": "CC0-1.0", "split": split_of(name)}
    return Document(id=name, text=text, domains=domains, known=known | domains, **{**defaults, **fields})


def toy_sequences(n: int = 12) -> list[TokenSequence]:
    """Token sequences of various lengths, of which a few positions do not count."""
    generator = np.random.default_rng(3)
    found = []
    for index in range(n):
        ids = generator.integers(0, 64, int(generator.integers(4, 20))).tolist()
        positions = np.flatnonzero(generator.random(len(ids)) < 0.8)
        if len(positions):
            found.append(TokenSequence(document=index, ids=ids, positions=positions))
    return found


def toy_harvest(folder: Path, **options: Any) -> Harvest:
    """A harvest of the toy sequences with the toy model, in shards of about 30 tokens."""
    arguments: dict[str, Any] = {"fingerprint": {"model": "toy"}, "shard_tokens": 30, **options}
    model = arguments.pop("model", None) or LlamaForCausalLM()
    sequences = arguments.pop("sequences", None) or toy_sequences()
    return harvest(model, sequences, arguments.pop("hook_names", TOY_HOOKS), folder, **arguments)


def contents(folder: Path, names: Iterable[str] | None = None) -> dict[str, bytes]:
    """The bytes of every finished file of a folder; temporary files are hidden ones."""
    chosen = sorted(folder.iterdir()) if names is None else [folder / name for name in names]
    return {path.name: path.read_bytes() for path in chosen if not path.name.startswith(".")}


def sparse_data(tokens: int = 1024, d_in: int = 16, features: int = 32, active: int = 3, seed: int = 0) -> Tensor:
    """(tokens, d_in) sums of a few of many directions: what a sparse autoencoder can find."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(features, d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    codes = torch.zeros(tokens, features)
    chosen = torch.rand(tokens, features, generator=generator).topk(active, dim=1).indices
    codes.scatter_(1, chosen, 1 + torch.rand(tokens, active, generator=generator))
    return 5 * (codes @ directions) + torch.randn(d_in, generator=generator)


def random_sae(d_in: int = 8, d_sae: int = 24, seed: int = 0, threshold: float = 0.4) -> SAE:
    """An untrained SAE that fires often."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return SAE(
        W_enc=W_dec.T.contiguous(),
        W_dec=W_dec,
        b_enc=0.1 * torch.randn(d_sae, generator=generator),
        b_dec=torch.randn(d_in, generator=generator),
        threshold=torch.full((d_sae,), threshold),
        hook_name="blocks.0.hook_resid_post",
    )
