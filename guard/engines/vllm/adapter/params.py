"""What the guard reads of a request's sampling parameters."""

from __future__ import annotations

from typing import Any


def end_tokens(params: Any) -> frozenset[int]:
    """The tokens that end an answer: what vLLM's `check_stop` looks at."""
    ends = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        ends.add(params.eos_token_id)
    return frozenset(ends)


def own_args(params: Any) -> dict[str, Any]:
    """What a request's `vllm_xargs` say to the guard."""
    return {k: v for k, v in (params.extra_args or {}).items() if k.startswith("sailguard_")}
