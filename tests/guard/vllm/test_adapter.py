"""What the worker makes of the scheduler's orders, as far as that needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from guard.engines.vllm.adapter.params import end_tokens, own_args
from guard.engines.vllm.adapter.worker import GuardedWorker
from guard.engines.vllm.config import Config, Rules, Tenant
from guard.engines.vllm.programs import Batch, Programs
from guard.engines.vllm.watch import Watch
from tests.factories import make_policy
from tests.guard.conftest import VARIED
from tests.guard.vllm.conftest import MakeJudging

STEER = {"domain": "violence", "action": "steer", "name": "away"}


def order(*new: Any, ended: tuple[str, ...] = (), **steer: tuple[int, list[tuple[str, str]]]) -> Any:
    return SimpleNamespace(finished_req_ids=set(ended), scheduled_new_reqs=list(new), sailguard=steer)


def request(name: str, own: str | None = None, max_tokens: int = 5) -> Any:
    args = None if own is None else {"sailguard_steer": own, "another": 1}
    params = SimpleNamespace(max_tokens=max_tokens, extra_args=args, stop_token_ids=[9], eos_token_id=2)
    return SimpleNamespace(req_id=name, sampling_params=params, prompt_token_ids=[4, 5, 6])


@pytest.fixture
def worker(judging_of: MakeJudging) -> Any:
    """A worker whose model is nowhere."""
    judging = judging_of(make_policy(STEER), **VARIED)
    bank, monitor = judging.monitor.bank, judging.monitor
    made: Any = object.__new__(GuardedWorker)
    made._guard = Config(bank, {"": Tenant(monitor.policy, overrides=True)}, 2)
    rules = Rules(bank, {"": monitor})
    made._programs = Programs(bank, monitor.encoder, rules.find, rows=16, capacity=2)
    made._watch = Watch({"": judging})
    made._brought = {}
    made.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100))
    return made


def steered(worker: Any, name: str, rows: int = 8) -> dict[int, list[tuple[str, str]]]:
    """The rules in force at each position of a request that is steered."""
    programs = worker._programs
    named = {number: sorted(keys) for keys, number in programs._program.items()}
    programs.place(Batch([name], np.array([0, rows]), np.array([0]), np.zeros(rows, dtype=np.int64)))
    found = programs._row_program[:rows].tolist()
    return {at: named[number] for at, number in enumerate(found) if number}


def test_a_request_that_comes_is_watched_to_the_end_that_its_parameters_say(worker: Any) -> None:
    worker._take_orders(order(request("a"), request("b", max_tokens=1000)))
    a, b = (worker._watch._requests[name] for name in "ab")
    assert (a.prompt, a.tenant, a.sampling.ends, a.sampling.limit) == ([4, 5, 6], "", {2, 9}, 6)
    assert b.sampling.limit == 97
    worker._take_orders(order(ended=("a",)))
    assert list(worker._watch._requests) == ["b"]


def test_a_policys_rule_steers_from_where_the_order_says(worker: Any) -> None:
    worker._take_orders(order(request("a")))
    worker._take_orders(order(a=(5, [("", "away")])))
    assert steered(worker, "a") == {at: [("", "away")] for at in (5, 6, 7)}


def test_what_a_request_asked_for_stays_in_force_when_a_rule_of_the_policy_fires(worker: Any) -> None:
    own = ("request:", "terror=ablate")
    worker._take_orders(order(request("a", "terror=ablate")))
    assert steered(worker, "a") == {at: [own] for at in range(8)}
    worker._take_orders(order(a=(5, [("", "away")])))
    assert steered(worker, "a") == {at: [("", "away"), own] if at >= 5 else [own] for at in range(8)}
    worker._take_orders(order(a=(7, [])))
    assert steered(worker, "a")[7] == [own]


def test_an_order_for_a_request_that_has_ended_leaves_nothing_behind(worker: Any) -> None:
    """A rule that steers and one that blocks may fire on the same token, or the client leaves meanwhile."""
    worker._take_orders(order(request("a")))
    worker._take_orders(order(ended=("a",), a=(4, [("", "away")])))
    assert worker._programs.requests == frozenset()


def test_one_combination_of_rules_too_many_is_the_affair_of_its_request(worker: Any) -> None:
    own = ["terror=1", "terror=2", "terror=3"]
    worker._take_orders(order(*(request(f"r{n}", item) for n, item in enumerate(own))))
    news = worker._watch.take_news()
    assert news.blocked == ["r2"]
    assert news.errors == {"block": 1}
    assert worker._programs.requests == {"r0", "r1"}


@pytest.mark.parametrize("item", ["L99/1=2", "violence/nothing=1"])
def test_what_the_bank_does_not_hold_does_not_end_the_engine(worker: Any, item: str) -> None:
    worker._take_orders(order(request("a"), request("b")))
    worker._steer("a", 0, [("request:", item)])
    news = worker._watch.take_news()
    assert news.blocked == ["a"]
    assert list(worker._watch._requests) == ["a", "b"]


def test_ranks_that_do_not_judge_keep_the_same_programs(worker: Any) -> None:
    worker._watch = None
    worker._take_orders(order(request("a", "terror=1")))
    worker._take_orders(order(a=(5, [("", "away")])))
    assert steered(worker, "a")[4] == [("request:", "terror=1")]
    worker._take_orders(order(ended=("a",)))
    assert worker._programs.requests == frozenset()


def test_slots_follow_the_block_tables(worker: Any) -> None:
    table = SimpleNamespace(get_numpy_array=lambda: np.array([[3, 1, 0], [5, 0, 0], [0, 0, 0]]), block_size=4)
    worker.model_runner = SimpleNamespace(input_batch=SimpleNamespace(block_table=[table]))
    slots = worker._slots_of(Batch(["a", "b"], np.array([0, 4, 5]), np.array([2, 1]), np.zeros(5, dtype=np.int64)))
    assert slots.rows.tolist() == [14, 15, 4, 5, 21]
    assert (slots.block_size, slots.tables.shape) == (4, (2, 3))
    assert slots.of(0, 0, 6).tolist() == [12, 13, 14, 15, 4, 5]


def test_parameters_are_read_as_vllm_gives_them() -> None:
    params = request("a", "terror=1").sampling_params
    assert own_args(params) == {"sailguard_steer": "terror=1"}
    assert end_tokens(params) == {2, 9}
    bare = SimpleNamespace(extra_args=None, stop_token_ids=None, eos_token_id=None)
    assert own_args(bare) == {}
    assert end_tokens(bare) == frozenset()
