"""What is not verified under continuous batching is refused by name; cached prompts are not shared between requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guard.core import Guard
from guard.errors import GuardError, UnsupportedGenerationError
from tests.factories import make_policy
from tests.guard.conftest import VARIED, Attach, MakeBank
from tests.guard.continuous.requests import Streamed, assert_same_reports, batching, greedy, run
from tests.guard.generation import FLAG_ALL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_cuda_graph", True),
        ("use_cuda_graph", (False, True)),
        ("use_async_batching", True),
        ("default_compile_level", 1),
        ("varlen_compile_config", {"mode": "default"}),
        ("decode_compile_config", {"mode": "default"}),
        ("cpu_offload_space", 0.5),
        ("cpu_offload_space", None),
    ],
)
def test_options_that_are_not_verified_are_refused_by_name(
    attach: Attach, tiny_model: Any, ids: list[list[int]], name: str, value: Any
) -> None:
    attach(make_policy())
    with pytest.raises(UnsupportedGenerationError, match=name):
        tiny_model.generate_batch(
            ids, generation_config=greedy(3), continuous_batching_config=batching(**{name: value})
        )
    run(tiny_model, ids, 2)


@pytest.mark.parametrize(("name", "value"), [("num_return_sequences", 2), ("guidance_scale", 2.0)])
@pytest.mark.parametrize("through", ["argument", "model"])
def test_ways_of_generating_that_cannot_be_followed_are_refused_by_name(
    attach: Attach, tiny_model: Any, ids: list[list[int]], name: str, value: Any, through: str
) -> None:
    attach(make_policy())
    config = greedy(3)
    setattr(config if through == "argument" else tiny_model.generation_config, name, value)
    with pytest.raises(UnsupportedGenerationError, match=name):
        tiny_model.generate_batch(
            ids,
            generation_config=config if through == "argument" else None,
            continuous_batching_config=batching(),
        )


def test_another_transformers_is_refused_by_what_it_lacks(
    attach: Attach, tiny_model: Any, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    tiny_model.set_attn_implementation("eager")
    attach(make_policy())
    monkeypatch.delattr(ContinuousBatchingManager, "pause")
    with pytest.raises(UnsupportedGenerationError, match=r"has no pause.*5\.19"):
        run(tiny_model, ids, 2)
    tiny_model.generate(torch.tensor([ids[0]]), max_new_tokens=2)  # its attention has not been switched


def test_prompts_are_not_shared_between_requests(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    """The sharing of cached prompts is on by default; the same prompt twice, one after the other, is judged twice."""
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    given = batching(max_requests_per_batch=1)
    assert given.allow_block_sharing
    twice = [ids[-1]] * 2
    outputs = chatty.generate_batch(twice, generation_config=greedy(4), continuous_batching_config=given)
    assert given.allow_block_sharing
    first, second = (output.generated_tokens for output in outputs.values())
    assert first == second
    assert_same_reports(guard.reports[:1], guard.reports[1:])


def test_prompt_that_comes_from_a_cache_is_refused(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    """Were the sharing on all the same, the second of two equal prompts would not be computed: it is not answered."""
    attach(make_policy(*FLAG_ALL, on_error="allow"), **VARIED)
    manager = chatty.init_continuous_batching(
        generation_config=greedy(4), continuous_batching_config=batching(max_requests_per_batch=1)
    )
    manager.continuous_batching_config.allow_block_sharing = True
    manager.start()
    try:
        names = manager.add_requests([ids[-1]] * 2)
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == 2)
    finally:
        manager.stop()
    assert seen.finished[names[0]].error is None
    assert "came from a cache" in seen.finished[names[1]].error
    assert seen.finished[names[1]].generated_tokens == []


def test_manager_from_before_the_guard_is_refused(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    config = {"generation_config": greedy(3), "continuous_batching_config": batching()}
    chatty.generate_batch(ids, persistent_manager=True, **config)
    attach(make_policy())
    with pytest.raises(UnsupportedGenerationError, match="destroy_cached_continuous_batching_manager"):
        chatty.generate_batch(ids, **config)
    chatty.destroy_cached_continuous_batching_manager()
    chatty.generate_batch(ids, **config)


def test_packed_pass_of_a_stranger_is_refused(bank_of: MakeBank, chatty: Any, tiny_tokenizer: Any) -> None:
    with (
        Guard(bank_of(), make_policy()).attach(chatty, tiny_tokenizer),
        pytest.raises(UnsupportedGenerationError, match="packed"),
    ):
        chatty(torch.tensor([[5, 6, 7]]), cu_seq_lens_q=torch.tensor([0, 2, 3]))


def test_prompt_without_tokens_is_refused(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    attach(make_policy())
    with pytest.raises(GuardError, match="no tokens"):
        chatty.generate_batch([[], ids[0]], generation_config=greedy(3), continuous_batching_config=batching())
