"""Continuous batching under the guard: requests join and leave, each is judged alone, and nothing else changes."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from feature_bank import DOMAINS
from guard.core import Guard
from guard.engines.requests import Request
from guard.errors import GuardError, UnsupportedGenerationError
from guard.events import SequenceReport
from guard.metrics import Metrics
from guard.session import AttachedGuard
from tests.factories import HOOKS, hooks_of, make_policy
from tests.guard.conftest import VARIED, Attach, MakeBank

FLAG_ALL = [{"domain": domain, "action": "flag", "evidence_tokens": 2} for domain in DOMAINS]
BLOCK = {"domain": "violence", "action": "block"}
STEER = {"domain": "violence", "action": "steer", "scope": ["prompt"], "steer": {"op": "add", "strength": 5.0}}
END = 2
NAMES = ("generate", "generate_batch", "init_continuous_batching")
JOIN = 30.0  # seconds that a test waits for a thread before it gives up


def greedy(tokens: int, **options: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=END, pad_token_id=END, **options)


def batching(**options: Any) -> Any:
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**{"page_size": 16, "num_blocks": 64, "max_batch_tokens": 128, **options})


def run(model: Any, prompts: list[list[int]], tokens: int = 12, **options: Any) -> list[list[int]]:
    """The answers of `generate_batch`, in the order of the prompts."""
    outputs = model.generate_batch(
        prompts,
        generation_config=greedy(12),
        continuous_batching_config=batching(**options),
        max_new_tokens=tokens,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    assert [output.prompt_ids for output in outputs.values()] == prompts
    return [output.generated_tokens for output in outputs.values()]


def run_together(model: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    """The outputs of requests that are all waiting when the first pass begins, so that every run cuts passes alike."""
    manager = model.init_continuous_batching(
        generation_config=greedy(12), continuous_batching_config=batching(**{"max_batch_tokens": 512, **options})
    )
    names = manager.add_requests(prompts)
    manager.start()
    try:
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == len(prompts))
    finally:
        manager.stop()
    return [seen.finished[name] for name in names]


def one_by_one(
    guard: AttachedGuard, prompts: list[list[int]], tokens: int = 12
) -> tuple[list[Any], list[SequenceReport]]:
    """Answers and reports of `generate`, a prompt at a time."""
    answers, reports = [], []
    for prompt in prompts:
        output = guard.model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
        row = output[0, len(prompt) :].tolist()
        answers.append(row[: row.index(END)] if END in row else row)
        reports += guard.reports
    return answers, reports


def median_cut(reports: list[SequenceReport], phase: str) -> float:
    """A probability of violence that half of the sequences reach."""
    scores = sorted(getattr(report, f"{phase}_scores")["violence"] for report in reports)
    half = len(scores) // 2
    assert scores[half - 1] < scores[half]
    return (scores[half - 1] + scores[half]) / 2


def assert_same_reports(mine: list[SequenceReport], others: list[SequenceReport]) -> None:
    for a, b in zip(mine, others, strict=True):
        assert (a.action, a.tokens_generated, a.tokens_observed) == (b.action, b.tokens_generated, b.tokens_observed)
        assert a.prompt_scores == pytest.approx(b.prompt_scores, abs=1e-3)
        assert a.response_scores == pytest.approx(b.response_scores, abs=1e-3)
        keys = [[(v.rule, v.phase, v.token_index) for v in report.verdicts] for report in (a, b)]
        assert keys[0] == keys[1]


@pytest.fixture(scope="module", autouse=True)
def fast_collection() -> Iterator[None]:
    """A manager that stops has all garbage collected; what stood before these tests need not be looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if not thread.daemon] == [threading.main_thread()]


@pytest.fixture
def ids(tiny_tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Six prompts of unequal length; the last two begin alike."""
    more = ["abcdefghijklmnopqrstuvwxyz" * 2, "abcdefghijklmnopqrstuvwxyz" * 3]
    found: list[list[int]] = tiny_tokenizer([*prompts, *more])["input_ids"]
    return found


@pytest.fixture
def unguarded(chatty: Any, ids: list[list[int]]) -> list[list[int]]:
    """What the model answers without a guard."""
    return run(chatty, ids)


class Streamed:
    """A manager whose outputs are gathered as they come."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.outputs: dict[str, list[list[int]]] = {}
        self.finished: dict[str, Any] = {}

    def gather(self, until: Callable[[], bool]) -> None:
        for _ in range(int(JOIN / 0.2)):
            if until():
                return
            output = self.manager.get_result(timeout=0.2)
            if output is not None:
                self.outputs.setdefault(output.request_id, []).append(list(output.generated_tokens))
                if output.is_finished():
                    self.finished[output.request_id] = output
        raise AssertionError(f"only {sorted(self.finished)} have finished")


# ---- unchanged where nothing fires, and judged as `generate` judges --------------------------------------


def test_answers_are_those_of_an_unguarded_run_when_nothing_fires(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(BLOCK, STEER), violence=False)
    assert run(chatty, ids) == unguarded
    assert [report.action for report in guard.reports] == ["allow"] * len(ids)
    assert [len(row) for row in unguarded] == [12] * len(ids)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"max_batch_tokens": 7},
        {"max_requests_per_batch": 2},
        {"scheduler_type": "prefill_first", "max_batch_tokens": 16},
        {"page_size": 4, "num_blocks": 40},
    ],
    ids=["all at once", "split prompts", "two at a time", "prompts first", "requests preempted"],
)
def test_verdicts_are_those_of_generate_however_passes_are_cut(
    attach: Attach, chatty: Any, ids: list[list[int]], shape: dict[str, Any]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    answers, expected = one_by_one(guard, ids)
    assert run(chatty, ids, **shape) == answers
    assert sum(bool(report.verdicts) for report in expected) > 0
    assert_same_reports(guard.reports, expected)
    assert [report.tokens_observed for report in guard.reports] == [12] * len(ids)


def test_requests_are_preempted_in_the_example_above(chatty: Any, ids: list[list[int]], attach: Attach) -> None:
    """It holds what it claims: tokens are read again from the start, and judged no second time."""
    again: list[int] = []
    unread = Request.unread
    guard = attach(make_policy(*FLAG_ALL), **VARIED)

    def count(request: Request, position: int, tokens: list[int]) -> int:
        again.append(unread(request, position, tokens))
        return again[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "unread", count)
        run(chatty, ids, page_size=4, num_blocks=40)
    assert sum(again) > 0
    assert [report.tokens_observed for report in guard.reports] == [12] * len(ids)


def test_every_position_is_judged_once(
    attach: Attach, chatty: Any, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    judged: dict[str, list[int]] = {}
    prompted: list[str] = []
    observe, judge = guard.monitor.observe_each, guard.monitor.observe_prompt

    def each(states: Any, sae_ins: Any) -> Any:
        for state in states:
            judged.setdefault(state.request_ids[0], []).append(int(state.count[0]))
        return observe(states, sae_ins)

    def prompt(state: Any, *args: Any) -> Any:
        prompted.append(state.request_ids[0])
        return judge(state, *args)

    monkeypatch.setattr(guard.monitor, "observe_each", each)
    monkeypatch.setattr(guard.monitor, "observe_prompt", prompt)
    run(chatty, ids, max_batch_tokens=9, max_requests_per_batch=3)
    names = [f"req_{i}" for i in range(len(ids))]
    assert sorted(prompted) == names
    assert judged == {name: list(range(12)) for name in names}
    assert [report.request_id for report in guard.reports] == names


@pytest.mark.parametrize("many", [False, True], ids=["a few", "more than one compiled call takes"])
def test_several_tokens_of_one_pass_are_judged_as_each_alone(attach: Attach, many: bool) -> None:
    monitor = attach(make_policy(*FLAG_ALL), **VARIED).monitor
    n = 20 if many else 3
    tokens = [{name: torch.randn(n, 32) * 3 for name in HOOKS} for _ in range(12)]
    states = [monitor.begin((str(i),)) for i in range(n)]
    batch = monitor.begin([str(i) for i in range(n)])
    for token in tokens:
        found = monitor.observe_each(states, token)
        fired = monitor.observe_hidden(batch, {name: x[:, None] for name, x in token.items()})
        assert [[v.rule for v in verdicts] for verdicts in found] == [
            [v.rule for row, v in fired if row == i] for i in range(n)
        ]
    for i, state in enumerate(states):
        assert monitor.scores(state, 0) == pytest.approx(monitor.scores(batch, i), abs=1e-5)


def test_requests_that_end_by_themselves_keep_their_end_token(
    attach: Attach, tiny_model: Any, ids: list[list[int]]
) -> None:
    ends = list(range(3, 60))
    config = greedy(12)
    config.eos_token_id = ends

    def answers() -> list[list[int]]:
        outputs = tiny_model.generate_batch(ids, generation_config=config, continuous_batching_config=batching())
        return [output.generated_tokens for output in outputs.values()]

    free = answers()
    assert len({len(row) for row in free}) > 1
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    assert answers() == free
    kept = [[token for token in row if token > 2] for row in free]
    expected = [len(row) - (row[-1] in ends) for row in kept]
    assert [report.tokens_generated for report in guard.reports] == expected
    assert [report.tokens_observed for report in guard.reports] == expected


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_short_answers_are_judged_to_the_last_token(
    attach: Attach, chatty: Any, ids: list[list[int]], tokens: int
) -> None:
    free = run(chatty, ids, tokens)
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    assert run(chatty, ids, tokens) == free
    assert [report.tokens_observed for report in guard.reports] == [tokens] * len(ids)


def test_answer_shorter_than_the_evidence_is_decided_at_its_end(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 6}), violence=True)
    run(chatty, ids, 3)
    assert [report.action for report in guard.reports] == ["block"] * len(ids)


def test_sampled_tokens_and_what_is_told_of_them_are_cut_alike(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL, BLOCK), **VARIED)
    config = greedy(12)
    config.do_sample = True
    outputs = chatty.generate_batch(
        ids,
        generation_config=config,
        continuous_batching_config=batching(return_logprobs=True, seed=1),
        record_timestamps=True,
    )
    for output, report in zip(outputs.values(), guard.reports, strict=True):
        assert len(output.generated_tokens) == len(output.logprobs) == len(output.timestamps)
        assert len(output.generated_tokens) == report.tokens_generated == report.tokens_observed


def test_paged_eager_attention_is_guarded_too(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    chatty.set_attn_implementation("eager")
    free = run(chatty, ids)
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    assert run(chatty, ids, max_batch_tokens=20) == free
    _, expected = one_by_one(guard, ids)
    run(chatty, ids)
    assert_same_reports(guard.reports, expected)


# ---- blocking --------------------------------------------------------------------------------------------


def test_prompt_verdict_blocks_before_the_first_token(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    metrics = Metrics()
    guard = attach(make_policy(BLOCK), metrics, violence=True)
    assert run(chatty, ids, max_batch_tokens=9) == [[]] * len(ids)
    for report in guard.reports:
        assert (report.action, report.tokens_generated) == ("block", 0)
        assert {v.phase for v in report.verdicts} == {"prompt"}
    value = metrics.registry.get_sample_value
    assert value("sailguard_requests_total", {"phase": "prompt", "result": "block"}) == len(ids)
    assert value("sailguard_verdicts_total", {"domain": "violence", "action": "block"}) == len(ids)


@pytest.mark.parametrize("shape", [{}, {"max_batch_tokens": 7}, {"max_requests_per_batch": 2}])
def test_blocked_requests_end_at_the_deciding_token_and_the_others_go_on(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]], shape: dict[str, Any]
) -> None:
    guard = attach(make_policy(), **VARIED)
    run(chatty, ids, **shape)
    cut = median_cut(guard.reports, "response")
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "threshold": {"probability": cut}}), **VARIED)
    found = run(chatty, ids, **shape)
    actions = [report.action for report in guard.reports]
    assert sorted(actions) == ["allow"] * 3 + ["block"] * 3
    for row, report in enumerate(guard.reports):
        if report.action == "allow":
            assert found[row] == unguarded[row]
        else:
            assert found[row] == unguarded[row][: report.verdicts[0].token_index + 1]
            assert report.tokens_observed == report.tokens_generated == len(found[row])


def test_end_token_that_is_suppressed_does_not_keep_a_blocked_request_alive(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"]}), violence=True)
    config = greedy(40, suppress_tokens=[END])
    outputs = chatty.generate_batch(ids, generation_config=config, continuous_batching_config=batching())
    assert [len(output.generated_tokens) for output in outputs.values()] == [3] * len(ids)
    assert [report.action for report in guard.reports] == ["block"] * len(ids)


@pytest.mark.parametrize("end", [-1, None])
@pytest.mark.parametrize("limit", [40, None])
def test_request_without_an_end_can_be_stopped(
    attach: Attach, chatty: Any, ids: list[list[int]], end: int | None, limit: int | None
) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"]}), violence=True)
    config = greedy(40)
    config.eos_token_id, config.max_new_tokens = end, limit
    outputs = chatty.generate_batch(ids, generation_config=config, continuous_batching_config=batching())
    assert [len(output.generated_tokens) for output in outputs.values()] == [3] * len(ids)
    assert [report.tokens_observed for report in guard.reports] == [3] * len(ids)


# ---- steering --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"max_batch_tokens": 16}, {"page_size": 4, "num_blocks": 40}])
def test_steering_changes_only_its_own_requests(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]], shape: dict[str, Any]
) -> None:
    guard = attach(make_policy(), **VARIED)
    run(chatty, ids)
    cut = median_cut(guard.reports, "prompt")
    guard = attach(make_policy({**STEER, "threshold": {"probability": cut}}), **VARIED)
    alone, expected = one_by_one(guard, ids)
    found = run(chatty, ids, **shape)
    assert found == alone
    assert_same_reports(guard.reports, expected)
    assert sorted(report.action for report in guard.reports) == ["allow"] * 3 + ["steer"] * 3
    for row, report in enumerate(guard.reports):
        assert (found[row] == unguarded[row]) == (report.action == "allow")


def test_steering_that_begins_in_an_answer_is_that_of_generate(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy(), **VARIED)
    run(chatty, ids, 24)
    cut = median_cut(guard.reports, "response")
    steer = {"op": "clamp", "strength": 3.0}
    rule = {**STEER, "scope": ["response"], "threshold": {"probability": cut}, "steer": steer, "cooldown_tokens": 2}
    guard = attach(make_policy(rule), **VARIED)
    alone, expected = one_by_one(guard, ids, 24)
    assert run(chatty, ids, 24) == alone
    assert_same_reports(guard.reports, expected)
    assert {report.action for report in expected} == {"allow", "steer"}


def test_steered_positions_are_those_from_the_verdict_on(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    """Seen by a hook of its own: which rows of which pass differ from those of an unguarded model."""
    seen: list[tuple[list[int], list[int], Tensor]] = []
    layer = chatty.model.layers[int(HOOKS[0].split(".")[1])]

    def passes(guard: AttachedGuard | None) -> dict[tuple[int, int], Tensor]:
        seen.clear()

        def before(_: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            seen.append((kwargs["cu_seq_lens_q"].tolist(), kwargs["position_ids"][0].tolist(), torch.empty(0)))

        def see(_: Any, _args: Any, output: Any) -> None:
            seen[-1] = (*seen[-1][:2], (output if isinstance(output, Tensor) else output[0])[0].clone())

        handles = [chatty.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(see)]
        run_together(chatty, ids[:3], allow_block_sharing=False)  # which would sort them
        for handle in handles:
            handle.remove()
        found = {}
        for edges, positions, hidden in seen:
            for number in range(len(edges) - 1):
                for row in range(edges[number], edges[number + 1]):
                    found[number, positions[row]] = hidden[row]
        return found

    free = passes(None)
    rule = {**STEER, "steer": {"op": "add", "strength": 1e-4}}  # too weak to change a token
    guard = attach(make_policy(rule), violence=True)
    steered = passes(guard)
    for (number, position), hidden in free.items():
        same = torch.equal(steered[number, position], hidden)
        assert same == (position < len(ids[number])), (number, position)
    assert [report.action for report in guard.reports] == ["steer"] * 3


@pytest.mark.parametrize("scope", ["prompt", "response"])
def test_request_that_is_read_again_is_steered_as_it_was(
    attach: Attach, chatty: Any, ids: list[list[int]], scope: str
) -> None:
    """What the layers after the hook get at a position is the same whenever it is read."""
    guard = attach(make_policy({**STEER, "scope": [scope]}), violence=True)
    read: dict[tuple[str, int], list[Tensor]] = {}

    def see(_: Any, _args: Any, output: Any) -> None:
        hidden = (output if isinstance(output, Tensor) else output[0])[0]
        for _, share, _ in guard._engine.continuous._pass:
            for i in range(len(share.ids)):
                read.setdefault((share.request_id, share.position + i), []).append(hidden[share.start + i].clone())

    handle = chatty.model.layers[int(HOOKS[0].split(".")[1])].register_forward_hook(see)
    run(chatty, ids, page_size=4, num_blocks=40)
    handle.remove()
    again = {place: found for place, found in read.items() if len(found) > 1}
    assert any(position >= len(ids[int(name.removeprefix("req_"))]) + 3 for name, position in again)
    for place, found in again.items():
        torch.testing.assert_close(
            torch.stack(found), found[0].expand(len(found), -1), atol=1e-4, rtol=1e-4, msg=str(place)
        )
    assert [report.action for report in guard.reports] == ["steer"] * len(ids)


# ---- the manager: requests that join later, streams, cancelling ------------------------------------------


def test_requests_join_and_leave_in_mid_flight(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    _, expected = one_by_one(guard, ids)
    options = {"generation_config": greedy(12), "continuous_batching_config": batching(max_requests_per_batch=3)}
    with chatty.continuous_batching_context_manager(**options) as manager:
        seen = Streamed(manager)
        names = [manager.add_request(ids[0], streaming=True), manager.add_request(ids[1], request_id="named")]
        seen.gather(lambda: len(seen.outputs.get(names[0], [])) >= 3)
        names += manager.add_requests(ids[2:], streaming=True)
        seen.gather(lambda: len(seen.finished) == len(ids))
    assert names[1] == "named"
    assert [seen.finished[name].generated_tokens for name in names] == unguarded
    assert [report.request_id for report in guard.reports] == names
    assert_same_reports(guard.reports, expected)


def test_a_stream_shows_a_token_only_after_it_was_judged(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    observed: dict[str, list[tuple[int, int]]] = {}
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(12), continuous_batching_config=batching()
    ) as manager:
        deliver = guard._engine.continuous._tap._deliver_batch  # type: ignore[union-attr]

        def watch(outputs: list[Any]) -> None:
            for output in outputs:
                request = guard._engine.continuous._requests.get(output.request_id)
                judged = 12 if request is None else int(request.begin(guard.monitor).count[0])
                observed.setdefault(output.request_id, []).append((len(output.generated_tokens), judged))
            deliver(outputs)

        guard._engine.continuous._tap._deliver_batch = watch  # type: ignore[union-attr]
        names = manager.add_requests(ids, streaming=True)
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == len(ids))
    for number, name in enumerate(names):
        steps = seen.outputs[name]
        assert steps == [unguarded[number][:n] for n in range(1, 13)]
        assert all(shown <= judged for shown, judged in observed[name])


def test_a_stream_that_may_still_be_blocked_is_held_back(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 4}), violence=True)
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(12), continuous_batching_config=batching()
    ) as manager:
        names = manager.add_requests(ids, streaming=True)
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == len(ids))
    deciding = [report.verdicts[0].token_index for report in guard.reports]
    assert [[len(step) for step in seen.outputs[name]] for name in names] == [[n + 1] for n in deciding]


def test_streams_read_through_handlers_are_cut_too(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 5}), violence=True)

    async def read(manager: Any, name: str, prompt: list[int]) -> list[int]:
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        manager.register_result_handler(name, outputs.put_nowait)
        manager.add_request(prompt, request_id=name, streaming=True)
        while not (output := await asyncio.wait_for(outputs.get(), JOIN)).is_finished():
            pass
        tokens: list[int] = output.generated_tokens
        return tokens

    async def read_all() -> list[list[int]]:
        with chatty.continuous_batching_context_manager(
            generation_config=greedy(12), continuous_batching_config=batching()
        ) as manager:
            return await asyncio.gather(*(read(manager, str(i), prompt) for i, prompt in enumerate(ids)))

    found = asyncio.run(read_all())
    assert found == [row[:5] for row in unguarded]
    assert [report.tokens_observed for report in guard.reports] == [5] * len(ids)


def test_a_request_that_is_called_off_is_reported_and_lets_the_others_go_on(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(400), continuous_batching_config=batching()
    ) as manager:
        seen = Streamed(manager)
        manager.add_request(ids[0], request_id="endless", streaming=True)
        seen.gather(lambda: len(seen.outputs.get("endless", [])) >= 3)
        manager.add_request(ids[1], request_id="short", max_new_tokens=12)
        manager.cancel_request("endless")
        manager.cancel_request("unheard of")
        seen.gather(lambda: "short" in seen.finished)
        manager.add_request(ids[2], request_id="endless", max_new_tokens=12)  # its name is free again
        seen.gather(lambda: "endless" in seen.finished)
    first, short, last = guard.reports
    assert (first.request_id, short.request_id, last.request_id) == ("endless", "short", "endless")
    assert 3 <= first.tokens_generated == first.tokens_observed < 400
    assert seen.finished["short"].generated_tokens == unguarded[1]
    assert seen.finished["endless"].generated_tokens == unguarded[2]


def test_texts_are_scored_while_requests_run(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    (expected,) = guard.score(["something else entirely"])
    _, reports = one_by_one(guard, ids)
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(12), continuous_batching_config=batching(max_requests_per_batch=1)
    ) as manager:
        names = manager.add_requests(ids)
        for _ in range(5):
            assert guard.score(["something else entirely"])[0].scores == pytest.approx(expected.scores, abs=1e-5)
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == len(ids))
    assert [seen.finished[name].generated_tokens for name in names] == unguarded
    assert_same_reports(guard.reports, reports)


def test_one_generation_at_a_time(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    guard = attach(make_policy())
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(5), continuous_batching_config=batching()
    ) as manager:
        for use in (
            lambda: chatty.generate(torch.tensor([ids[0]]), max_new_tokens=3),
            lambda: chatty(torch.tensor([ids[0]])),
            lambda: guard.chat([{"role": "user", "content": "x"}], max_new_tokens=2),
            lambda: chatty.generate_batch(ids),
        ):
            with pytest.raises(GuardError, match="running"):
                use()
        manager.add_request(ids[0], request_id="one", max_new_tokens=200)
        with pytest.raises(GuardError, match="in flight"):
            manager.add_request(ids[0], request_id="one")
        manager.cancel_request("one")
    assert guard.chat([{"role": "user", "content": "x"}], max_new_tokens=2).completion_tokens == 2


# ---- when the guard fails --------------------------------------------------------------------------------


def fail(guard: AttachedGuard, monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    calls: list[int] = []
    original = getattr(guard.monitor, place)

    def broken(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise ValueError("injected")
        return original(*args)

    monkeypatch.setattr(guard.monitor, place, broken)


@pytest.mark.parametrize(("place", "shown"), [("observe_prompt", 0), ("observe_each", 3)])
def test_failure_stops_every_request_in_flight(
    attach: Attach,
    chatty: Any,
    ids: list[list[int]],
    unguarded: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    shown: int,
) -> None:
    metrics = Metrics()
    guard = attach(make_policy(), metrics, **VARIED)
    fail(guard, monkeypatch, place, 3)
    outputs = run_together(chatty, ids)
    assert [output.generated_tokens for output in outputs] == [row[:shown] for row in unguarded]
    assert [report.action for report in guard.reports] == ["block"] * len(ids)
    assert guard.errors == ["ValueError: injected"]
    assert metrics.registry.get_sample_value("sailguard_errors_total", {"on_error": "block"}) == 1


@pytest.mark.parametrize(("on_error", "action"), [("allow", "allow"), ("flag", "flag")])
@pytest.mark.parametrize("shape", [{}, {"max_batch_tokens": 9}])
@pytest.mark.parametrize("place", ["observe_prompt", "observe_each"])
def test_failure_that_is_let_pass_is_counted_and_told(
    attach: Attach,
    chatty: Any,
    ids: list[list[int]],
    unguarded: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    on_error: str,
    action: str,
    shape: dict[str, Any],
    place: str,
) -> None:
    metrics = Metrics()
    guard = attach(make_policy(on_error=on_error), metrics, **VARIED)
    fail(guard, monkeypatch, place, 3)
    assert run(chatty, ids, **shape) == unguarded
    actions = [report.action for report in guard.reports]
    assert action in actions
    assert metrics.registry.get_sample_value("sailguard_errors_total", {"on_error": on_error}) == len(guard.errors) > 0
    if place == "observe_each":
        assert min(report.tokens_observed for report in guard.reports) < 12
    assert {report.tokens_generated for report in guard.reports} == {12}


def test_hooks_that_were_removed_are_noticed_and_nothing_is_emitted(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy())
    for layer in chatty.model.layers:
        layer._forward_hooks.clear()
    assert run(chatty, ids) == [[]] * len(ids)
    assert "did not fire" in guard.errors[0]


def test_failure_at_the_end_of_a_request_emits_nothing_of_it(
    attach: Attach, chatty: Any, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = attach(make_policy(), **VARIED)
    fail(guard, monkeypatch, "finish", 1)
    assert run(chatty, ids[:1]) == [[]]
    assert guard.reports[0].action == "block"


@pytest.mark.parametrize("on_error", ["block", "allow"])
def test_a_pass_that_cannot_be_mapped_fails_every_request(
    attach: Attach, chatty: Any, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    from guard.engines import batch_manager

    guard = attach(make_policy(on_error=on_error))
    original = batch_manager.read_shares
    calls: list[int] = []

    def shifted(manager: Any, kwargs: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) == 4:
            kwargs = {**kwargs, "cu_seq_lens_q": kwargs["cu_seq_lens_q"] + 1}
        return original(manager, kwargs)

    monkeypatch.setattr("guard.engines.continuous.read_shares", shifted)
    for output in run_together(chatty, ids):
        assert "not that of the" in output.error
        assert len(output.generated_tokens) == 2  # read and judged before
    assert len(guard.reports) == len(ids)
    calls.clear()
    with pytest.raises(UnsupportedGenerationError, match="not that of the"):
        chatty.generate_batch(ids, generation_config=greedy(12), continuous_batching_config=batching())
    monkeypatch.undo()
    run(chatty, ids)


def test_error_in_the_model_fails_the_requests_and_leaves_the_guard_usable(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("injected")

    handle = chatty.model.layers[-1].register_forward_pre_hook(hook)
    outputs = run_together(chatty, ids)
    handle.remove()
    assert {output.error for output in outputs} == {"injected"}
    assert [output.generated_tokens for output in outputs] == [row[:2] for row in unguarded]
    assert [report.tokens_observed for report in guard.reports] == [2] * len(ids)
    assert run(chatty, ids) == unguarded


# ---- what is refused, and what is switched off -----------------------------------------------------------


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


# ---- detaching -------------------------------------------------------------------------------------------


def test_second_call_begins_anew_also_with_a_manager_that_is_kept(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    config = {"generation_config": greedy(12), "continuous_batching_config": batching()}
    for _ in range(2):
        outputs = chatty.generate_batch(ids, persistent_manager=True, **config)
        assert [output.generated_tokens for output in outputs.values()] == unguarded
        assert [report.tokens_observed for report in guard.reports] == [12] * len(ids)
    guard.close()
    assert "_cached_continuous_batching_manager" not in vars(chatty)
    assert run(chatty, ids) == unguarded


def test_detaching_restores_the_model(
    bank_of: MakeBank, chatty: Any, tiny_tokenizer: Any, ids: list[list[int]]
) -> None:
    free, names = run(chatty, ids), set(vars(chatty))
    with Guard(bank_of(violence=True), make_policy(BLOCK)).attach(chatty, tiny_tokenizer):
        manager = chatty.init_continuous_batching(generation_config=greedy(12), continuous_batching_config=batching())
        assert run(chatty, ids) == [[]] * len(ids)
    assert (set(vars(chatty)), hooks_of(chatty)) == (names, 0)
    assert not set(NAMES) & set(vars(chatty))
    assert "add_request" not in vars(manager)
    assert run(chatty, ids) == free


def test_detaching_stops_what_is_running(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(400), continuous_batching_config=batching(num_blocks=300)
    ) as manager:
        seen = Streamed(manager)
        names = manager.add_requests(ids, streaming=True)
        seen.gather(lambda: all(len(seen.outputs.get(name, [])) >= 3 for name in names))
        guard.close()
        assert not manager.is_running()
        assert "deliver" not in vars(manager.output_router)
        left = [
            manager.output_router.output_queue.get_nowait() for _ in range(manager.output_router.output_queue.qsize())
        ]
    failed = {output.request_id: output for output in left if output.is_finished()}
    assert {output.error is None for output in failed.values()} == {False}
    assert [len(failed[name].generated_tokens) for name in names] == [r.tokens_observed for r in guard.reports]


def test_guard_that_is_paused_leaves_the_model_alone(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(BLOCK), violence=True)
    with guard._engine.paused():
        assert run(chatty, ids) == unguarded
    assert guard.reports == []
    assert run(chatty, ids) == [[]] * len(ids)


# ---- the real model --------------------------------------------------------------------------------------


def test_embedded_model_is_guarded_as_under_generate(embedded: Any) -> None:
    chats = ["Name three fruits.", "How do I kill a Python process?", "Describe how to stab a man with a knife."]
    with Guard.from_bank().attach(embedded.model, embedded.tokenizer) as guard:
        prompts = [guard.prompt_ids([{"role": "user", "content": chat}]) for chat in chats]
        guard.complete([[{"role": "user", "content": chats[0]}]], max_new_tokens=1)
        expected, answers = [], []
        for prompt in prompts:
            output = embedded.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
            answers.append(output[0, len(prompt) :].tolist())
            expected += guard.reports
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=embedded.tokenizer.eos_token_id)
        outputs = embedded.model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching(max_batch_tokens=24)
        )
        found = [output.generated_tokens for output in outputs.values()]
        end = embedded.tokenizer.eos_token_id
        assert found == [row[: row.index(end)] if end in row else row for row in answers]
        assert_same_reports(guard.reports, expected)
        assert "block" in {report.action for report in guard.reports}
