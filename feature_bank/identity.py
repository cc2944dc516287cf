"""Which model is this? Hashes by which a bank recognises the model and tokenizer it was made for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from feature_bank.errors import BankError
from feature_bank.schema import ModelIdentity

# What decides the meaning of an activation. Names, paths, dtype and library versions do not.
_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "vocab_size",
    "tie_word_embeddings",
    "rope_parameters",
)


def identify(model: Any, tokenizer: Any, model_id: str) -> ModelIdentity:
    """The identity of a Hugging Face model and tokenizer."""
    config = model.config.to_dict()
    kept = {name: config.get(name) for name in _CONFIG_FIELDS}
    vocabulary = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": sorted(tokenizer.all_special_ids),
        "chat_template": tokenizer.chat_template,
    }
    return ModelIdentity(
        id=model_id,
        config_hash=_digest(kept),
        tokenizer_hash=_digest(vocabulary),
        d_model=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
    )


def weights_digest(model: Any) -> str:
    """sha256 over the beginning of every weight: tells a fine-tuned model from the one it came from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_identity(model: Any, tokenizer: Any, expected: ModelIdentity) -> None:
    """Raise BankError naming the difference if the bank was made for another model or tokenizer."""
    found = identify(model, tokenizer, expected.id)
    for field in ("n_layers", "d_model", "config_hash", "tokenizer_hash"):
        want, have = getattr(expected, field), getattr(found, field)
        if want != have:
            raise BankError(
                f"the bank was made for model {expected.id!r}, but the given model differs in {field}: "
                f"expected {want}, found {have}; load that model or train a bank for this one",
                file="bank.json",
                field=f"model.{field}",
            )


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()
