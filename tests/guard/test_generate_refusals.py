"""What the guard cannot follow is refused by the name of the argument, before anything has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guard.errors import GuardError, UnsupportedGenerationError
from guard.session import AttachedGuard
from tests.factories import make_policy
from tests.guard.conftest import Attach
from tests.guard.generation import Batch


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("use_cache", False),
        ("cache_implementation", "static"),
        ("prompt_lookup_num_tokens", 3),
        ("guidance_scale", 2.0),
        ("penalty_alpha", 0.5),
        ("prefill_chunk_size", 4),
        ("token_healing", True),
    ],
)
@pytest.mark.parametrize("through", ["argument", "configuration", "positional", "model"])
def test_unsupported_generation_is_refused_by_argument(
    attach: Attach, tiny_model: Any, batch: Batch, name: str, value: Any, through: str
) -> None:
    from transformers import GenerationConfig

    attach(make_policy())
    config = GenerationConfig(max_new_tokens=4)
    setattr(config, name, value)
    args: tuple[Any, ...] = (batch["input_ids"],)
    options: dict[str, Any] = {"max_new_tokens": 4}
    if through == "argument":
        options[name] = value
    elif through == "configuration":
        options = {"generation_config": config}
    elif through == "positional":
        args, options = (*args, config), {}
    else:
        setattr(tiny_model.generation_config, name, value)
    with pytest.raises(UnsupportedGenerationError, match=name):
        tiny_model.generate(*args, **options)


def test_unsupported_inputs_are_refused_by_argument(attach: Attach, tiny_model: Any, batch: Batch) -> None:
    from transformers import DynamicCache, StaticCache, TextStreamer

    attach(make_policy())
    embeds = tiny_model.get_input_embeddings()(batch["input_ids"])
    full = DynamicCache(config=tiny_model.config)
    full.update(torch.zeros(4, 2, 3, 8), torch.zeros(4, 2, 3, 8), 0)
    for name, value in {
        "inputs_embeds": embeds,
        "assistant_model": tiny_model,
        "past_key_values": full,
        "streamer": object.__new__(TextStreamer),
    }.items():
        with pytest.raises(UnsupportedGenerationError, match=name):
            tiny_model.generate(**batch, **{name: value}, max_new_tokens=4)
    static = StaticCache(config=tiny_model.config, max_cache_len=64)
    with pytest.raises(UnsupportedGenerationError, match="past_key_values"):
        tiny_model.generate(**batch, past_key_values=static, max_new_tokens=4)
    with pytest.raises(UnsupportedGenerationError, match="inputs_embeds"):
        tiny_model(inputs_embeds=embeds)


def test_refusal_changes_nothing(attach: Attach, tiny_model: Any, batch: Batch) -> None:
    guard = attach(make_policy())
    tiny_model.generate(**batch, max_new_tokens=3, do_sample=False)
    before = guard.reports
    with pytest.raises(UnsupportedGenerationError):
        tiny_model.generate(**batch, max_new_tokens=3, num_beams=2)
    assert guard.reports == before
    tiny_model.generate(**batch, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("change", ["unseen", "several", "other rows", "rewound", "mask"])
def test_pass_that_cannot_be_mapped_is_refused(attach: Attach, tiny_model: Any, batch: Batch, change: str) -> None:
    guard = attach(make_policy())
    step = torch.tensor([[5]] * 4)
    with torch.inference_mode():
        cache = tiny_model(**batch, use_cache=True).past_key_values
        options: dict[str, Any] = {"past_key_values": cache}
        if change == "unseen":
            guard._engine.drop()
        elif change == "several":
            step = torch.tensor([[5, 6]] * 4)
        elif change == "other rows":
            step = step[:2]
        elif change == "rewound":
            tiny_model(step, past_key_values=cache)
            cache.crop(-1)
        else:
            options["attention_mask"] = torch.zeros(4, 1, 1, cache.get_seq_length() + 1)
        with pytest.raises(UnsupportedGenerationError):
            tiny_model(step, **options)


def test_second_guard_on_a_model_is_refused(attach: Attach, tiny_model: Any, tiny_tokenizer: Any) -> None:
    guard: AttachedGuard = attach(make_policy())
    with pytest.raises(GuardError, match="already attached"):
        guard.guard.attach(tiny_model, tiny_tokenizer)
    guard.score(["x"])
