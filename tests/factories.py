"""Builders of what tests need: the tiny model, a small random bank that belongs to it, and policies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from feature_bank.bank import Bank, Rows, save_bank
from feature_bank.identity import identify
from feature_bank.schema import Calibration, FeatureRecord, HeadRecord, Heads, Pooling
from feature_bank.taxonomy import DOMAINS
from guard.canary import canary_activations
from guard.capture import truncated_forward
from guard.encoder import SelectedEncoder
from guard.hook_points import parse_hook_name
from guard.policy import Policy

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HOOKS = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
PER_HOOK = 12
CANARY = "A small bird sang in the garden; nobody listened, 42 times."
POOLING = Pooling(window=8, min_tokens=2, ceiling=4.0, evidence_tokens=3)
ALWAYS, NEVER = 40.0, -40.0


def make_tiny_model(hidden_size: int = 32) -> LlamaForCausalLM:
    """A Llama of 4 layers, by default of width 32, with seeded random weights, in float32, ready to be read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.to(torch.float32).eval().requires_grad_(False)


def make_bank(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    fires: Mapping[str, bool | None] | None = None,
    pooling: Pooling = POOLING,
    hooks: Sequence[str] = HOOKS,
    seed: int = 0,
) -> Bank:
    """Write a random but consistent bank for `model` to `folder` and return it.

    fires: per domain True (its probability is 1 on every token), False (0 on every token), or None (it depends on the
    text, and is 0.5 for the average token). A domain that is not named never fires.
    """
    generator = np.random.default_rng(seed)
    d_in = model.config.hidden_size
    sample = [int(t) for t in generator.integers(3, model.config.vocab_size, 200)]
    hidden = truncated_forward(model, hooks, torch.tensor([sample]))
    rows, features, hook_records = {}, [], []
    for hook in hooks:
        acts = hidden[hook][0].double().numpy()
        decoder = generator.normal(size=(PER_HOOK, d_in))
        decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
        pre = acts @ decoder.T
        bias = -np.quantile(pre, 0.4, axis=0)
        threshold = np.quantile(np.maximum(pre + bias, 0), 0.5, axis=0) + 1e-3
        fired = (pre + bias) * (pre + bias > threshold)
        rows[hook] = Rows(
            W_enc=decoder.T.astype(np.float16).astype(np.float32),
            W_dec=decoder.astype(np.float16).astype(np.float32),
            b_enc=bias.astype(np.float32),
            threshold=threshold.astype(np.float32),
        )
        layer = parse_hook_name(hook).layer
        for i in range(PER_HOOK):
            features.append(
                FeatureRecord(
                    id=f"L{layer}/{7 * i + 3}",
                    hook_name=hook,
                    layer=layer,
                    index=7 * i + 3,
                    domains=[DOMAINS[i % len(DOMAINS)]],
                    explanation=f"made-up feature {i} of layer {layer}",
                    threshold=float(threshold[i]),
                    scale=float(max(np.quantile(fired[:, i], 0.999), 1e-3)),
                    density=float((fired[:, i] > 0).mean()),
                )
            )
        hook_records.append(_hook_record(hook, d_in))
    parts: dict[str, Any] = {
        "features": features,
        "heads": Heads(pooling=pooling, heads=_heads(features, generator, dict(fires or {}))),  # type: ignore[arg-type]  # keys are domains
        "rows": rows,
    }
    manifest = {
        "name": "tiny",
        "version": "1",
        "created": "2025-01-01T00:00:00Z",
        "tool_version": "0",
        "model": identify(model, tokenizer, "tiny-llama").model_dump(),
        "hook_points": hook_records,
        "corpus": [{"name": "random", "licence": "CC0-1.0", "sha256": _digest("random"), "rows": 1}],
        "canary": {"text": CANARY, "activations": {features[0].id: 1.0}, "tolerance": 0.02},
    }
    draft = save_bank(folder, manifest=manifest, **parts)
    encoder = SelectedEncoder(draft, torch.device("cpu"))
    found = canary_activations(encoder, model, tokenizer, CANARY).tolist()
    activations = {f.id: value for f, value in zip(features, found, strict=True)}
    return save_bank(
        folder, manifest={**manifest, "canary": {**manifest["canary"], "activations": activations}}, **parts
    )


def make_policy(*rules: Mapping[str, Any], **fields: Any) -> Policy:
    """A policy of the given rules; a rule without a threshold has that of probability 0.5."""
    filled = [{"threshold": {"probability": 0.5}, **rule} for rule in rules]
    return Policy.model_validate({"name": "test", "refusal": "REFUSED", **fields, "rules": filled})


def hooks_of(model: torch.nn.Module) -> int:
    """How many hooks of any kind are on the model's modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def _heads(
    features: Sequence[FeatureRecord], generator: np.random.Generator, fires: dict[str, bool | None]
) -> dict[str, HeadRecord]:
    heads = {}
    for domain in DOMAINS:
        ids = [f.id for f in features if domain in f.domains]
        weights = generator.normal(size=len(ids)) * 6
        weights[0] = abs(weights[0]) + 1.0
        wanted = fires.get(domain, False)
        centre = -float(weights @ [f.density * 0.5 for f in features if domain in f.domains])
        heads[domain] = HeadRecord(
            features=ids,
            weights=[float(w) if wanted is None else 0.0 for w in weights],
            bias=centre if wanted is None else 0.0,
            calibration=Calibration(slope=1.5, intercept=0.0 if wanted is None else ALWAYS if wanted else NEVER),
            thresholds={"0.001": 0.9, "0.01": 0.7, "0.05": 0.5},
            streaming_thresholds={"0.001": 0.9, "0.01": 0.7, "0.05": 0.5},
            steering=[float(v) for v in generator.normal(size=len(ids))],
        )
    return heads


def _hook_record(hook: str, d_in: int) -> dict[str, Any]:
    return {
        "hook_name": hook,
        "d_in": d_in,
        "d_sae": 128,
        "n_selected": PER_HOOK,
        "sae_sha256": _digest(hook),
        "fvu": 0.1,
        "l0": 6.0,
        "dead_fraction": 0.0,
        "fires_precision": 1.0,
        "fires_recall": 1.0,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
