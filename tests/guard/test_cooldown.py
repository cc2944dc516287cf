"""A rule steers as long as it is above its threshold, and lets go a cool-down after it fell below."""

from __future__ import annotations

from typing import Any

import torch

from guard.steering import Steering
from tests.factories import make_policy
from tests.guard.conftest import Attach
from tests.guard.generation import Batch, row_alone


def steering_with_a_cooldown(tokens: int) -> dict[str, Any]:
    steer = {"op": "add", "strength": 0.0}
    return {"domain": "violence", "action": "steer", "steer": steer, "cooldown_tokens": tokens}


def test_a_rule_that_stays_above_its_threshold_is_not_released(attach: Attach, chatty: Any, batch: Batch) -> None:
    engine = attach(make_policy(steering_with_a_cooldown(3)), violence=True)._engine
    act, in_force = engine._act, []

    def watch(fired: Any) -> None:
        act(fired)
        in_force.append(engine._steering is not None and bool(engine._steering._in_force))

    engine._act = watch  # type: ignore[method-assign]
    chatty.generate(**row_alone(batch, 1), max_new_tokens=40, do_sample=False)
    assert True in in_force
    assert all(in_force[in_force.index(True) :])


def test_what_a_rule_steered_since_the_prompt_is_let_go_after_its_cooldown(attach: Attach, batch: Batch) -> None:
    guard = attach(make_policy(steering_with_a_cooldown(3)), violence=False)
    engine, monitor = guard._engine, guard.monitor
    engine.start()
    engine._before_forward(None, (), dict(row_alone(batch, 1)))
    state, (bound,) = engine.state, monitor.streaming_rules.rules
    assert state is not None
    engine._steering = Steering(monitor.bank, monitor.encoder, 1)
    engine._steering.steer(0, bound)
    state.prompted[0, 0] = state.counting = True
    silent = torch.zeros(1, monitor.encoder.n_features)
    in_force = []
    for _ in range(monitor.bank.pooling.settle_tokens + 5):
        engine._act(monitor.observe_step(state, silent))
        in_force.append(bool(engine._steering._in_force))
    kept = monitor.bank.pooling.settle_tokens - 1 + 2  # the average has to settle before it is below anything
    assert in_force == [True] * kept + [False] * (len(in_force) - kept)
