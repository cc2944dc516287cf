"""The playground on the embedded model and the shipped bank: what is traced is what was judged, and steering steers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from feature_bank.bank import shipped_bank_path
from feature_bank.heads import agreement
from guard.core import Guard
from guard.metrics import Metrics
from guard.policy import Policy
from guard.serving import ServingGuard
from service.engine import TransformersEngine
from tests.service.test_playground import play, text_of, tokens_of

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not shipped_bank_path().exists(), reason="the shipped bank is not in place"),
]

CHAT = {"messages": [{"role": "user", "content": "Tell me about the weather in spring."}], "max_tokens": 16}
DOMAIN = "politics"


@pytest.fixture(scope="module")
def engine_of_model(embedded: Any) -> Iterator[TransformersEngine]:
    threshold = {"probability": 0.999}
    policy = Policy.model_validate({"rules": [{"domain": DOMAIN, "threshold": threshold, "action": "flag"}]})
    serving = ServingGuard(Guard.from_bank(policy=policy, metrics=Metrics()), embedded.model, embedded.tokenizer)
    engine = TransformersEngine(serving, embedded.model_id)
    yield engine
    engine.close()


@pytest.fixture
def client(make_app: Callable[..., Any], engine_of_model: TransformersEngine) -> Iterator[TestClient]:
    with TestClient(make_app(engine_of_model)) as client:
        yield client


def activation(tokens: list[dict[str, Any]], features: set[str]) -> float:
    """Mean over the tokens of what the features' activations come to."""
    return float(np.mean([sum(a for name, a, _ in token["f"] if name in features) for token in tokens]))


def test_the_plain_run_is_the_chat_and_the_steered_one_speaks_of_what_it_is_clamped_to(
    client: TestClient, engine_of_model: TransformersEngine
) -> None:
    answer = client.post("/v1/chat/completions", json={**CHAT, "model": "sailguard", "temperature": 0}).json()
    events = play(client, **CHAT, steer=[f"{DOMAIN}=clamp:2"], compare=True)
    assert [event["type"] for event in events][0 :: len(events) - 1] == ["start", "done"]
    assert text_of(events, "plain") == answer["choices"][0]["message"]["content"]
    ends = {event["run"]: event for event in events if event["type"] == "end"}
    assert set(ends) == {"plain", "steered"}
    assert ends["plain"]["tokens"]["response"] == answer["usage"]["completion_tokens"]
    assert ends["plain"]["prompt_scores"] == pytest.approx(answer["sailguard"]["prompt_scores"], abs=1e-4)
    assert ends["plain"]["response_scores"] == pytest.approx(answer["sailguard"]["response_scores"], abs=1e-4)
    head = engine_of_model.bank.heads[DOMAIN]
    steered = {name for name, delta in zip(head.features, head.steering, strict=True) if delta > 0}
    assert activation(tokens_of(events, "steered"), steered) > 2 * activation(tokens_of(events, "plain"), steered)
    assert ends["steered"]["response_scores"][DOMAIN] > ends["plain"]["response_scores"][DOMAIN]
    for run, end in ends.items():
        prompt, response = tokens_of(events, run, "prompt"), tokens_of(events, run)
        assert (len(prompt), len(response)) == (end["tokens"]["prompt"], end["tokens"]["response"])
        assert "".join(token["t"] for token in prompt).count("Tell me about the weather in spring.") == 1
        assert {token["o"] for token in prompt} == {True, False}


@pytest.mark.parametrize("steer", [[], [f"{DOMAIN}=-1"]])
def test_the_scores_of_a_run_are_those_of_its_tokens(
    client: TestClient, engine_of_model: TransformersEngine, steer: list[str]
) -> None:
    events = play(client, **CHAT, steer=steer)
    run = events[0]["runs"][0]
    (end,) = (event for event in events if event["type"] == "end")
    pooling = engine_of_model.bank.pooling
    for phase, settled in (("prompt", pooling.window), ("response", pooling.settle_tokens)):
        judged = [token for token in tokens_of(events, run, phase) if token["o"]]
        scores, segments = np.array([token["s"] for token in judged]), np.array([token["g"] for token in judged])
        agreed = agreement(scores, segments, pooling.evidence_tokens, settled=settled).max(0)
        found = dict(zip(events[0]["domains"], agreed.tolist(), strict=True))
        assert found == pytest.approx(end[f"{phase}_scores"], abs=2e-6)


def test_an_ablated_feature_is_gone_from_what_the_later_layers_read(
    client: TestClient, engine_of_model: TransformersEngine, embedded: Any
) -> None:
    """What is traced is read before a feature is ablated; a hook behind the guard's sees what is left of it."""
    bank, serving = engine_of_model.bank, engine_of_model._serving
    encoder, continuous = serving.monitor.encoder, serving._shared.attached.engine.continuous
    seen = {hit[0] for token in tokens_of(play(client, **CHAT)) for hit in token["f"]}
    feature = next(f for f in bank.features if f.id in seen and not f.direction)
    column = bank.features.index(feature)
    left: list[float] = []
    before: list[float] = []

    def see(_: Any, _args: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output)[0]
        part = encoder.columns[feature.hook_name]
        for request, share, _ in continuous._pass:
            rows = [i for i in range(len(share.ids)) if share.position + i >= len(request.prompt)]
            read = [share.start + i for i in rows]
            if read:
                left.extend(encoder.read(feature.hook_name, hidden[read])[1][:, column - part.start].tolist())
                seen_here = continuous._hidden[feature.hook_name][0, read]
                before.extend(encoder.read(feature.hook_name, seen_here)[1][:, column - part.start].tolist())

    handle = embedded.model.model.layers[feature.layer].register_forward_hook(see)
    try:
        events = play(client, **CHAT, steer=[f"{feature.id}=ablate"])
    finally:
        handle.remove()
    assert events[-1] == {"type": "done"}
    assert len(left) == len(tokens_of(events, "steered"))
    assert max(before) > 0
    assert max(left) == 0.0


def test_a_text_of_many_scripts_is_traced_in_its_own_characters(client: TestClient) -> None:
    text = "Spring 你好 🙂 \ufffd in Zürich, 東京."
    events = play(client, input=text)
    assert text_of(events, phase="prompt") == text
    assert any(len(token["f"]) > 5 for token in tokens_of(events, phase="prompt"))
