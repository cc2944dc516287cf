"""What `model.generate` was called with, and which of it the guard refuses."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from guard.errors import GuardError, UnsupportedGenerationError

_NOT_SEQUENCES = "the rows of the batch would not be sequences that grow by a token a step"


class _Option(NamedTuple):
    name: str
    accepted: tuple[Any, ...]
    reason: str


_OPTIONS = (
    *(
        _Option(name, (None,), _NOT_SEQUENCES)
        for name in (
            "assistant_model",
            "assistant_early_exit",
            "prompt_lookup_num_tokens",
            "penalty_alpha",
            "constraints",
            "force_words_ids",
            "dola_layers",
            "custom_generate",
            "prefill_chunk_size",
        )
    ),
    _Option("num_beams", (None, 1), _NOT_SEQUENCES),
    _Option("num_beam_groups", (None, 1), _NOT_SEQUENCES),
    _Option("use_mtp", (None, False), _NOT_SEQUENCES),
    _Option("use_cache", (None, True), "every step would read all earlier tokens again"),
    _Option("cache_implementation", (None, "hybrid", "dynamic"), "the guard follows a dynamic cache only"),
    _Option("inputs_embeds", (None,), "embeddings cannot be mapped to tokens"),
    _Option("guidance_scale", (None, 1), "the unconditional passes are not text of any sequence"),
    _Option("token_healing", (None, False), "it generates a first time to repair the prompt"),
    _Option("streamer", (None,), "it is given a token before the guard has judged it; use the guard's stream()"),
)


def bind_options(generate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `generate` by name, whichever way they were passed."""
    bound = inspect.signature(generate).bind(*args, **kwargs).arguments
    return {**bound, **bound.pop("kwargs", {})}


def effective(model: Any, options: dict[str, Any], name: str) -> Any:
    """The value that `generate` will use: the argument, the given configuration's, or the model's."""
    for source in (options, vars(options.get("generation_config") or object), vars(model.generation_config)):
        if source.get(name) is not None:
            return source[name]
    return None


def refuse_unsupported(model: Any, options: dict[str, Any]) -> None:
    """Raise UnsupportedGenerationError, naming the argument, for ways of generating that cannot be followed."""
    for name, accepted, reason in _OPTIONS:
        value = effective(model, options, name)
        if not any(value is a or value == a for a in accepted):
            raise UnsupportedGenerationError(
                f"generate({name}={_short(value)}) is not supported under the guard: {reason}; "
                f"leave it at {accepted[-1]!r}, or detach the guard"
            )
    cache = options.get("past_key_values")
    if cache is not None and (type(cache).__name__ != "DynamicCache" or cache.get_seq_length() > 0):
        raise UnsupportedGenerationError(
            f"generate(past_key_values={_short(cache)}) is not supported under the guard: it follows a dynamic cache "
            "from its first token; leave it at None and give the whole text as input_ids, or detach the guard"
        )


def end_ids(model: Any, tokenizer: Any, options: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a sequence, the model's own first.

    Raises GuardError if neither the call, the model nor the tokenizer names one: blocking needs it.
    """
    found = effective(model, options, "eos_token_id")
    if found is None:
        found = tokenizer.eos_token_id
    if hasattr(found, "tolist"):
        found = found.tolist()
    ids = tuple(found) if isinstance(found, (list, tuple)) else () if found is None else (int(found),)
    if not ids:
        raise GuardError("neither the model nor the tokenizer names an end-of-sequence token; blocking needs one")
    return ids


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"<{type(value).__name__}>"
