"""`/v1/compare`: two sides are judged as each would judge alone, and nothing of the running server changes."""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from feature_bank.bank import Bank
from feature_bank.versions import VersionStore
from guard.core import Guard
from guard.engines.onnx import OnnxEngine
from guard.engines.onnx_export import export_onnx
from guard.metrics import Metrics
from guard.policy import Policy
from guard.policy_file import SHIPPED, shipped_policies
from guard.serving import ServingGuard
from service.engine import TransformersEngine
from service.events import EventBus
from service.policies import MAX_POLICY
from tests.service.audits import stored
from tests.service.edges import write_keys
from tests.service.file_engine import FileEngine, feature_policy, policy_text
from tests.service.test_auth import line

URL = "/v1/compare"
TEXTS = ["a small bird", "one two three four five six", ""]
COUNTED = ("sailguard_request_seconds", "sailguard_batch_texts", "sailguard_requests_in_flight")
"""What says that a request came and that the model ran."""
KEYS = {"client": "key-of-a-client", "reader": "key-of-a-reader", "admin": "key-of-an-admin"}


def rule(action: str, probability: float = 0.9, **more: Any) -> str:
    """A policy with one rule on violence, of which the tiny bank is always sure."""
    one = {"domain": "violence", "threshold": {"probability": probability}, "action": action, **more}
    return yaml.safe_dump({"name": f"only-{action}", "rules": [one]})


FLAGS, BLOCKS, SILENT = rule("flag"), rule("block"), rule("block", 0.9999999)
FAILING = {
    "no policy": {"yaml": "rules: 1"},
    "no such feature": {"yaml": feature_policy("L9/9")},
    "steers prompts": {"yaml": rule("steer", steer={"prompt": True})},
    "no such bank": {"bank": "no-such"},
    "no such policy": {"policy": "no-such"},
}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policies" / "house.yaml"
    path.parent.mkdir()
    path.write_text(FLAGS)
    return path


@pytest.fixture
def store(tmp_path: Path, write_bank: Callable[..., Path]) -> VersionStore:
    """Two versions, of which the first is current, and one of another model."""
    store = VersionStore(tmp_path / "store")
    first = store.promote(write_bank(tmp_path / "first")).version
    store.promote(write_bank(tmp_path / "second", explanation="written anew", evidence_tokens=3))
    store.promote(write_bank(tmp_path / "third", identity={"config_hash": "0" * 64}))
    store.rollback(first)
    return store


@pytest.fixture
def real(
    make_app: Callable[..., Any],
    store: VersionStore,
    policy: Path,
    tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> Iterator[TestClient]:
    """A server without keys around the tiny model, which keeps an audit."""
    guard = Guard.from_bank(store.folder, policy=policy, metrics=Metrics())
    serving = ServingGuard(guard, tiny_model, tiny_tokenizer, cache_tokens=4096)
    engine = TransformersEngine(serving, "tiny-llama")
    app = make_app(engine, bank=store.folder, policy=policy, audit=tmp_path / "audit.db")
    with TestClient(app) as client:
        yield client
    engine.close()


def services(client: TestClient) -> Any:
    return client.app.state.services  # type: ignore[attr-defined]


def compare(client: TestClient, left: Any = None, right: Any = None, **body: Any) -> Any:
    sides = {name: side for name, side in (("left", left), ("right", right)) if side is not None}
    return client.post(URL, json={"texts": TEXTS, **sides, **body})


def compared(*arguments: Any, **body: Any) -> dict[str, Any]:
    response = compare(*arguments, **body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def metrics_of(client: TestClient) -> dict[Any, float]:
    """Every series but those that say that a request came and that the model ran."""
    page = services(client).metrics.render().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.startswith(COUNTED) and not sample.name.endswith("_created")
    }


def state(client: TestClient, *folders: Path) -> Any:
    files = {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    shown = {name: client.get(f"/v1/{name}").json() for name in ("about", "compare")}
    return services(client).slot.engine, metrics_of(client), files, shown


# ---- nothing changes ---------------------------------------------------------------------------------------------


def test_a_comparison_changes_nothing(
    real: TestClient, store: VersionStore, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = store.history()[1].version
    before = state(real, store.folder, policy.parent)
    published: list[Any] = []
    monkeypatch.setattr(EventBus, "publish", lambda _, event: published.append(event))
    found = compared(real, {"bank": other}, {"yaml": BLOCKS})
    assert [result["right"]["action"] for result in found["results"]] == ["block", "block", "allow"]
    assert state(real, store.folder, policy.parent) == before
    assert (published, stored(tmp_path / "audit.db")) == ([], [])


def test_a_comparison_that_fails_changes_nothing_either(real: TestClient, store: VersionStore, policy: Path) -> None:
    before = state(real, store.folder, policy.parent)
    for kind, broken in {**FAILING, "another model's bank": {"bank": store.history()[2].version}}.items():
        for side in ("left", "right"):
            response = compare(real, **{"left": {"yaml": SILENT}, "right": {"yaml": BLOCKS}, side: broken})
            error = response.json()["error"]
            status = 404 if kind in ("no such bank", "no such policy") else 409
            assert (response.status_code, error["param"]) == (status, f"{side}.{next(iter(broken))}"), response.text
            assert str(policy.parent) not in error["message"], "a draft's place says nothing"
            assert state(real, store.folder, policy.parent) == before


def test_engines_of_comparisons_are_gone_afterwards(
    real: TestClient, store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    original = TransformersEngine.reloaded

    def reloaded(self: TransformersEngine, *places: Any) -> TransformersEngine:
        new = original(self, *places)
        made.append(weakref.ref(new))
        made.append(weakref.ref(new.policy))
        return new

    monkeypatch.setattr(TransformersEngine, "reloaded", reloaded)
    other = store.history()[1].version
    shared = services(real).slot.engine._serving._shared.attached.engine
    captures: list[int] = []
    for number in range(4):
        compared(real, {"bank": other, "yaml": SILENT}, {"bank": other, "yaml": rule("block", 0.5 + number / 100)})
        captures.append(sum(len(capture._handles) for capture in shared._captures.values()))
    assert len(made) == 16
    gc.collect()
    assert [reference() for reference in made] == [None] * 16
    assert len(set(captures)) == 1, "hooks do not pile up"


def test_the_sidecars_engines_are_gone_too_and_share_one_model(
    make_app: Callable[..., Any],
    write_bank: Callable[..., Path],
    tiny_model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = VersionStore(tmp_path / "store")
    first = store.promote(write_bank(tmp_path / "first")).version
    fits = store.promote(write_bank(tmp_path / "second", explanation="written anew")).version
    other = store.promote(write_bank(tmp_path / "third", identity={"config_hash": "0" * 64})).version
    store.rollback(first)
    export_onnx(tmp_path / "first", tmp_path / "out", tiny_model, tiny_tokenizer)
    engine = OnnxEngine.start(tmp_path / "out", bank=store.folder, threads=1)
    made: list[weakref.ref[OnnxEngine]] = []
    original = OnnxEngine.reloaded

    def reloaded(self: OnnxEngine, *places: Any) -> OnnxEngine:
        new = original(self, *places)
        assert new._model is engine._model
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(OnnxEngine, "reloaded", reloaded)
    with TestClient(make_app(engine, bank=store.folder)) as client:
        before = state(client, store.folder)
        for _ in range(3):
            found = compared(client, {"bank": fits}, {"yaml": FLAGS})
            assert (found["left"]["bank"], found["right"]["bank"]) == (fits, first)
            assert [result["right"]["action"] for result in found["results"]] == ["flag", "flag", "allow"]
        response = compare(client, {"bank": other})
        assert (response.status_code, response.json()["error"]["param"]) == (409, "left.bank")
        assert state(client, store.folder) == before
    gc.collect()
    assert [reference() for reference in made] == [None] * 6


def test_a_comparison_that_takes_too_long_ends_and_leaves_nothing(
    make_app: Callable[..., Any], bank: Path, policy: Path
) -> None:
    engine = FileEngine.start(bank, policy, Metrics())
    engine.world.on_build = lambda: time.sleep(0.6)
    with TestClient(make_app(engine, bank=bank, policy=policy, request_timeout=0.2)) as client:
        response = compare(client, {"yaml": policy_text("other")})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
        assert services(client).slot.engine is engine
    assert [path.name for path in policy.parent.iterdir()] == ["house.yaml"]


# ---- what is said ------------------------------------------------------------------------------------------------


def test_two_sides_alike_show_no_change(real: TestClient, store: VersionStore) -> None:
    other = store.history()[1].version
    for side in ({}, {"yaml": BLOCKS}, {"yaml": FLAGS}, {"bank": store.current}, {"bank": other, "yaml": SILENT}):
        found = compared(real, side, side)
        assert found["left"] == found["right"]
        assert [result["index"] for result in found["results"]] == [0, 1, 2]
        assert all(result["left"] == result["right"] and not result["changed"] for result in found["results"])
        summary = found["summary"]
        assert (summary["changed"], summary["newly_blocked"], summary["newly_allowed"]) == (0, 0, 0)
        assert set(summary["mean_score_change"].values()) == {0.0}


def test_a_side_says_what_the_server_would_if_it_ran_on_it(real: TestClient, policy: Path) -> None:
    found = compared(real, None, {"yaml": BLOCKS}, role="passage")
    for text, result in zip(TEXTS, found["results"], strict=True):
        own = real.post("/v1/traces", json={"input": text, "role": "passage"}).json()["score"]
        assert result["left"] == {name: own[name] for name in ("action", "scores", "flagged", "verdicts")}
    policy.write_text(BLOCKS)
    engine = services(real).slot.engine.reloaded(None, policy)
    for text, result in zip(TEXTS, found["results"], strict=True):
        (own,) = engine.score([text], ["passage"])
        assert result["right"]["action"] == own.action
        assert result["right"]["verdicts"] == json.loads(json.dumps([verdict.to_dict() for verdict in own.verdicts]))
    assert found["right"] == {"bank": engine.bank_version, "policy": engine.policy_version}


def test_the_summary_adds_up(real: TestClient) -> None:
    flags_blocks = compared(real, {"yaml": FLAGS}, {"yaml": BLOCKS})["summary"]
    assert (flags_blocks["changed"], flags_blocks["newly_blocked"], flags_blocks["newly_allowed"]) == (2, 2, 0)
    blocks_silent = compared(real, {"yaml": BLOCKS}, {"yaml": SILENT})["summary"]
    assert (blocks_silent["changed"], blocks_silent["newly_blocked"], blocks_silent["newly_allowed"]) == (2, 0, 2)
    silent_flags = compared(real, {"yaml": SILENT}, {"yaml": FLAGS})["summary"]
    assert (silent_flags["changed"], silent_flags["newly_blocked"], silent_flags["newly_allowed"]) == (2, 0, 0)


def test_a_side_like_what_is_in_use_is_judged_by_the_running_engine(
    make_app: Callable[..., Any], bank: Path, policy: Path
) -> None:
    engine = FileEngine.start(bank, policy, Metrics())
    with TestClient(make_app(engine, bank=bank, policy=policy)) as client:
        for side in ({}, {"bank": engine.bank_version}, {"policy": engine.policy_version}, {"yaml": FLAGS + "\n#\n"}):
            compared(client, side, side)
        assert engine.world.builds == 0
        compared(client, {"yaml": BLOCKS}, {"yaml": BLOCKS + "# the same"})
        assert engine.world.builds == 1


def test_others_get_their_turn(client: TestClient, engine: Any) -> None:
    texts = [f"text {number}" for number in range(200)]
    assert len(compared(client, texts=texts)["results"]) == 200
    assert [text for batch in engine.batches for text in batch] == texts
    assert max(map(len, engine.batches)) <= 32
    assert not engine.overlapped


# ---- what can be chosen ------------------------------------------------------------------------------------------


def test_versions_of_the_store_and_shipped_policies_can_be_chosen(
    real: TestClient, store: VersionStore, policy: Path
) -> None:
    found = real.get(URL).json()
    assert found["object"] == "choices"
    assert {bank["id"] for bank in found["banks"]} == {event.version for event in store.history()}
    assert [bank["id"] for bank in found["banks"] if bank["current"]] == [store.current]
    assert [one["id"] for one in found["policies"]] == [Policy.load(policy).version, *shipped_policies()]
    assert [one["label"] for one in found["policies"] if one["current"]] == ["only-flag"]
    for side in ({"bank": store.history()[1].version}, *({"policy": one["id"]} for one in found["policies"])):
        response = compare(real, side)
        if side == {"policy": "strict"}:  # it asks for a threshold that the tiny bank does not hold
            assert (response.status_code, response.json()["error"]["param"]) == (409, "left.policy")
        else:
            assert response.status_code == 200, side


def test_the_shipped_bank_can_be_chosen_where_it_fits(make_app: Callable[..., Any], engine: Any, bank: Path) -> None:
    with TestClient(make_app(engine, bank=bank)) as client:
        banks = client.get(URL).json()["banks"]
    assert [(one["id"], one["current"]) for one in banks] == [("bank-1", True), (engine.bank.version, False)]
    with TestClient(make_app(FileEngine.start(bank, None, Metrics()), bank=bank)) as client:
        assert [one["id"] for one in client.get(URL).json()["banks"]] == [Bank.load(bank).version]


def test_a_shipped_policy_in_use_is_listed_once_and_means_the_shipped_file(
    make_app: Callable[..., Any], bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strict").write_text(policy_text("an impostor"))
    monkeypatch.chdir(tmp_path)
    engine = FileEngine.start(bank, SHIPPED / "balanced.yaml", Metrics())
    with TestClient(make_app(engine, bank=bank)) as client:
        policies = client.get(URL).json()["policies"]
        found = compared(client, {"policy": "balanced"}, {"policy": "strict"})
    assert [(one["id"], one["current"]) for one in policies] == [
        (name, name == "balanced") for name in shipped_policies()
    ]
    assert engine.world.builds == 1
    assert found["right"]["policy"] == Policy.load(SHIPPED / "strict.yaml").version


@pytest.mark.parametrize(
    "body",
    [
        {"texts": []},
        {"texts": ["x"] * 201},
        {"texts": "x"},
        {"texts": [1]},
        {"role": "poem"},
        {"left": {"yaml": FLAGS, "policy": "strict"}},
        {"left": {"yaml": ""}},
        {"left": {"yaml": "#" * (MAX_POLICY + 1)}},
        {"left": {"bank": ""}},
        {"left": {"folder": "/etc"}},
        {"left": None},
        {"middle": {}},
    ],
)
def test_what_is_no_comparison_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post(URL, json={"texts": ["a bird"], **body})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("name", ["/etc/passwd", "../first", "store", "versions", "..", "house.yaml"])
def test_no_file_can_be_named(real: TestClient, name: str) -> None:
    for side in ({"bank": name}, {"policy": name}):
        response = compare(real, side)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "choice_not_found")
    assert compare(real, {"yaml": "extends: /etc/passwd"}).status_code == 409


def test_only_an_administrator_or_a_server_without_keys_compares(make_app: Callable[..., Any], tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", *(line(key, f"the-{role}", role) for role, key in KEYS.items()))
    with TestClient(make_app(api_keys_file=keys)) as client:
        for role, key in KEYS.items():
            for method, body in (("GET", None), ("POST", {"texts": ["a bird"]})):
                response = client.request(method, URL, json=body, headers={"Authorization": f"Bearer {key}"})
                assert response.status_code == (200 if role == "admin" else 403), (role, method)
                if role == "client":
                    assert "admin key" in response.json()["error"]["message"]
    with TestClient(make_app(api_keys=KEYS["client"])) as client:
        response = client.get(URL, headers={"Authorization": f"Bearer {KEYS['client']}"})
        assert response.status_code == 403
