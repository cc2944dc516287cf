"""Which guard an engine runs, and which model: the same in all of its processes."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from guard.engines.vllm import config as settings
from guard.errors import GuardError


def identity_of(guard: settings.Config) -> dict[str, Any]:
    """What must be the same in two processes of an engine, and in the making of its compiled graphs, as JSON."""
    policies = {tenant: found.policy.version for tenant, found in guard.tenants.items()}
    return {"bank": guard.bank.content_hash, "policies": policies, "taps": _source_digest()}


def same_guard(vllm_config: Any) -> settings.Config:
    """What this process reads of the environment. Raises GuardError if the engine was configured with another guard."""
    guard = settings.read_config()
    if vllm_config.additional_config.get("sailguard") != identity_of(guard):
        raise GuardError(
            "this process of the engine reads another bank or policy than the one that configured it: give all of them "
            f"the same {settings.BANK}, {settings.POLICY} and {settings.TENANTS}"
        )
    return guard


@cache
def _source_digest() -> str:
    here = Path(__file__).parent.parent
    return hashlib.sha256(b"".join((here / f"{n}.py").read_bytes() for n in ("taps", "programs"))).hexdigest()[:16]


def model_of(model_config: Any) -> tuple[Any, Any]:
    """The model's configuration and tokenizer as transformers reads them: vLLM changes its own copies."""
    from transformers import AutoConfig, AutoTokenizer

    options = {"trust_remote_code": model_config.trust_remote_code}
    config = AutoConfig.from_pretrained(model_config.model, revision=model_config.revision, **options)
    tokenizer = AutoTokenizer.from_pretrained(
        model_config.tokenizer, revision=model_config.tokenizer_revision, **options
    )
    return config, tokenizer
