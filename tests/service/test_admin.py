"""`/admin`: what is in use is shown, switching is all or nothing, and no file can be named from afar."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_bank.bank import HEADS, WEIGHTS
from feature_bank.versions import VersionStore
from guard.metrics import Metrics
from guard.policy import Policy
from service.policies import MAX_POLICY
from tests.service.file_engine import FileEngine, feature_policy, policy_text

KEY = "an-admin-key-for-tests"
ADMIN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policies" / "house.yaml"
    path.parent.mkdir()
    path.write_text("# written by hand\n" + policy_text())
    return path


@pytest.fixture
def store(bank: Path, tmp_path: Path) -> VersionStore:
    store = VersionStore(tmp_path / "store")
    store.promote(bank)
    return store


@pytest.fixture
def other(write_bank: Callable[..., Path], tmp_path: Path) -> Path:
    return write_bank(tmp_path / "other", explanation="written anew")


@pytest.fixture
def open_admin(make_app: Callable[..., Any]) -> Iterator[Callable[..., TestClient]]:
    """A client of a server on the given bank and policy."""
    clients: list[TestClient] = []

    def start(bank: Path, policy: Path | None = None) -> TestClient:
        engine = FileEngine.start(bank, policy, Metrics())
        client = TestClient(make_app(engine, bank=bank, policy=policy, admin_keys=KEY), headers=ADMIN)
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__()


def slot(client: TestClient) -> Any:
    return client.app.state.services.slot.engine  # type: ignore[attr-defined]


def error(response: Any, status: int = 409) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found


def files(folder: Path) -> dict[str, bytes]:
    """What lies below a folder, but for the policy store's own."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# ---- bank --------------------------------------------------------------------------------------------------------


def test_the_bank_in_use_is_shown_with_its_versions(
    open_admin: Callable[..., TestClient], store: VersionStore, other: Path
) -> None:
    client = open_admin(store.folder)
    first = store.current
    store.promote(other)
    status = client.get("/admin/bank").json()
    assert status["version"] == first
    assert status["features"] == 2
    assert status["domains"]["violence"] == 1
    assert status["manifest"]["canary"]["text"] == "a small bird"
    assert status["manifest"]["hook_points"][0]["hook_name"] == "blocks.1.hook_resid_post"
    assert set(status["manifest"]["files"]) == {"features.jsonl", "weights.safetensors", "heads.json"}
    assert status["place"] == {"kind": "store", "path": str(store.folder)}
    assert [(version["version"] == first, version["current"]) for version in status["versions"]] == [
        (True, False),
        (False, True),
    ]
    assert [event["action"] for event in status["history"]] == ["promote", "promote"]
    assert status["last_reload"] is None


def test_a_bank_that_is_no_store_is_shown_and_cannot_be_switched(
    open_admin: Callable[..., TestClient], bank: Path
) -> None:
    client = open_admin(bank)
    status = client.get("/admin/bank").json()
    assert (status["place"]["kind"], status["versions"], status["history"]) == ("folder", None, [])
    for response in (
        client.post("/admin/bank/promote", json={"version": "1"}),
        client.post("/admin/bank/rollback"),
    ):
        found = error(response)
        assert found["code"] == "no_bank_store"
        assert "bank promote" in found["message"]


def test_a_version_of_the_store_is_switched_to_and_back(
    open_admin: Callable[..., TestClient], store: VersionStore, other: Path
) -> None:
    first = store.current
    second = store.promote(other).version
    client = open_admin(store.folder)
    back = client.post("/admin/bank/rollback").json()
    assert (back["result"], back["bank"], back["previous_bank"]) == ("ok", first, second)
    assert (store.current, slot(client).bank_version) == (first, first)
    forth = client.post("/admin/bank/promote", json={"version": second}).json()
    assert (forth["result"], store.current, slot(client).bank_version) == ("ok", second, second)
    named = client.post("/admin/bank/rollback", json={"to": first})
    assert (named.status_code, store.current) == (200, first)
    assert client.get("/admin/bank").json()["last_reload"]["bank"] == first


@pytest.mark.parametrize("harm", ["corrupted", "another model's"])
def test_a_bad_version_is_refused_before_it_becomes_the_current_one(
    open_admin: Callable[..., TestClient],
    store: VersionStore,
    write_bank: Callable[..., Path],
    tmp_path: Path,
    harm: str,
) -> None:
    first = str(store.current)
    identity = {"config_hash": "0" * 64} if harm == "another model's" else None
    second = store.promote(write_bank(tmp_path / "bad", explanation="bad", identity=identity)).version
    store.rollback(first)
    if harm == "corrupted":
        with (store.folder / "versions" / second / WEIGHTS).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
    client = open_admin(store.folder)
    engine, before = slot(client), os.readlink(store.folder / "current")
    for response in (
        client.post("/admin/bank/promote", json={"version": second}),
        client.post("/admin/bank/rollback", json={"to": second}),
    ):
        found = error(response)
        assert found["code"] == "refused"
        assert "keeps serving" in found["message"]
        assert os.readlink(store.folder / "current") == before
        assert slot(client) is engine
    shown = client.get("/admin/bank").json()["last_reload"]
    assert (shown["result"], shown["bank"]) == ("refused", first)
    assert shown["problem"] in found["message"]


@pytest.mark.parametrize("name", ["../../bank", "/etc", "..", "versions/x", "", "no-such", "x" * 300])
def test_only_what_is_in_the_store_can_be_named(
    open_admin: Callable[..., TestClient], store: VersionStore, name: str
) -> None:
    client = open_admin(store.folder)
    engine = slot(client)
    status = 404 if 0 < len(name) <= 250 else 400
    error(client.post("/admin/bank/promote", json={"version": name}), status)
    error(client.post("/admin/bank/rollback", json={"to": name}), status)
    assert slot(client) is engine


def test_there_may_be_no_version_before_this_one(open_admin: Callable[..., TestClient], store: VersionStore) -> None:
    client = open_admin(store.folder)
    assert "no version" in error(client.post("/admin/bank/rollback"))["message"]


def test_a_bank_is_reloaded_or_refused(open_admin: Callable[..., TestClient], bank: Path, other: Path) -> None:
    client = open_admin(bank)
    assert client.post("/admin/bank/reload").json()["result"] == "unchanged"
    shutil.rmtree(bank)
    shutil.copytree(other, bank)
    assert client.post("/admin/bank/reload").json()["result"] == "ok"
    (bank / HEADS).write_bytes(b"{}")
    found = error(client.post("/admin/bank/reload"))
    assert HEADS in found["message"]
    assert client.get("/admin/bank").json()["last_reload"]["result"] == "refused"
    metrics = slot(client).metrics.registry.get_sample_value
    assert metrics("sailguard_reloads_total", {"what": "bank", "result": "refused"}) == 1


# ---- policy ------------------------------------------------------------------------------------------------------


def test_the_policy_in_use_is_shown(open_admin: Callable[..., TestClient], bank: Path, policy: Path) -> None:
    client = open_admin(bank, policy)
    status = client.get("/admin/policy").json()
    assert (status["name"], status["on_error"], status["file"]) == ("house", "block", str(policy))
    assert status["source"] == policy.read_text()
    assert status["source_in_use"] is True
    policy.write_text("name: [")
    assert client.get("/admin/policy").json()["source_in_use"] is False
    policy.unlink()
    assert client.get("/admin/policy").json()["source"] is None


def test_what_is_shown_as_yaml_is_the_policy_in_use(
    open_admin: Callable[..., TestClient], bank: Path, policy: Path, tmp_path: Path
) -> None:
    policy.write_text("name: mine\nextends: strict\nrefusal: 'Nein, äh'\n")
    status = open_admin(bank, policy).get("/admin/policy").json()
    copy = tmp_path / "copy.yaml"
    copy.write_text(status["yaml"], encoding="utf-8")
    assert Policy.load(copy).version == status["version"]


def test_validation_changes_nothing(open_admin: Callable[..., TestClient], bank: Path, policy: Path) -> None:
    client = open_admin(bank, policy)
    engine, before = slot(client), files(policy.parent)
    good = client.post("/admin/policy/validate", json={"yaml": policy_text("new")}).json()
    assert good["valid"] is True
    assert good["policy"].startswith("new+")
    assert good["bank"] == engine.bank_version
    bad = client.post("/admin/policy/validate", json={"yaml": feature_policy("L9/9")}).json()
    assert (bad["valid"], bad["policy"]) == (False, None)
    assert "'L9/9'" in bad["problem"]
    assert "'house.yaml', line" in bad["problem"], "the place is given in the file that the sender knows"
    assert slot(client) is engine
    assert files(policy.parent) == before
    info = {"name": "house", "version": engine.policy_version, "on_error": "block"}
    assert engine.metrics.registry.get_sample_value("sailguard_policy_info", info) == 1


def test_a_policy_is_put_in_place_and_the_earlier_one_comes_back_byte_for_byte(
    open_admin: Callable[..., TestClient], bank: Path, policy: Path, log: io.StringIO
) -> None:
    policy.write_bytes(b"# K\xc3\xb6ln, with a comment and  odd   spacing\r\n" + policy_text("house").encode())
    policy.chmod(0o640)
    first = policy.read_bytes()
    client = open_admin(bank, policy)
    second = "# the second\n" + policy_text("second")
    result = client.post("/admin/policy/promote", json={"yaml": second}).json()
    assert (result["result"], policy.read_text()) == ("ok", second)
    assert slot(client).policy_version == result["policy"]
    assert result["policy"].startswith("second+")
    assert policy.stat().st_mode & 0o777 == 0o640
    result = client.post("/admin/policy/rollback").json()
    assert (result["result"], policy.read_bytes()) == ("ok", first)
    assert slot(client).policy_version.startswith("house+")
    assert client.post("/admin/policy/rollback", json={"to": "second"}).status_code == 200
    assert policy.read_text() == second
    history = client.get("/admin/policy").json()["history"]
    assert [event["action"] for event in history] == ["found", "promote", "rollback", "rollback"]
    keys = {event["by"] for event in history[1:]}
    assert len(keys) == 1
    assert KEY not in str(history)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert {line["key_id"] for line in lines if line["event"] == "admin"} == keys
    assert client.post("/admin/policy/reload").json()["result"] == "unchanged"


def test_rolling_back_goes_step_by_step(open_admin: Callable[..., TestClient], bank: Path, policy: Path) -> None:
    client = open_admin(bank, policy)
    for name in ("second", "third"):
        client.post("/admin/policy/promote", json={"yaml": policy_text(name)})
    names = []
    for _ in range(2):
        assert client.post("/admin/policy/rollback").status_code == 200
        names.append(slot(client).policy.name)
    assert names == ["second", "house"]
    assert "no policy was in place" in error(client.post("/admin/policy/rollback"))["message"]
    error(client.post("/admin/policy/rollback", json={"to": "fourth"}), 404)
    error(client.post("/admin/policy/rollback", json={"to": "../house"}), 404)


def test_what_was_changed_by_hand_is_kept_too(open_admin: Callable[..., TestClient], bank: Path, policy: Path) -> None:
    client = open_admin(bank, policy)
    client.post("/admin/policy/promote", json={"yaml": policy_text("second")})
    by_hand = b"# by hand\n" + policy_text("hand").encode()
    policy.write_bytes(by_hand)
    client.post("/admin/policy/promote", json={"yaml": policy_text("third")})
    client.post("/admin/policy/rollback")
    assert policy.read_bytes() == by_hand


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (feature_policy("L9/9"), "'L9/9'"),
        ("name: [", "YAML"),
        ("name: x\nextends: /etc/passwd\n", "extends"),
        ("name: x\nextends: ../secret.yaml\n", "extends"),
        ("name: x\nextends: secret.env\n", "extends"),
        ("name: &a x\nrefusal: *a\nrules: []\n", "aliases"),
        ("[" * 5000, "YAML"),
        ("name: \x00", "YAML"),
        ("name: x\nrules: [{when: " + "{all: [" * 400 + "]}" * 400 + "}]\n", "policy"),
    ],
)
def test_a_bad_policy_is_refused_and_leaves_no_trace(
    open_admin: Callable[..., TestClient], bank: Path, policy: Path, text: str, part: str
) -> None:
    (policy.parent.parent / "secret.yaml").write_text(policy_text())
    (policy.parent / "secret.env").write_text("PASSWORD=hidden")
    client = open_admin(bank, policy)
    engine, before = slot(client), files(policy.parent)
    found = error(client.post("/admin/policy/promote", json={"yaml": text}))
    assert part in found["message"]
    assert "hidden" not in found["message"]
    assert client.post("/admin/policy/validate", json={"yaml": text}).json()["valid"] is False
    assert slot(client) is engine
    assert files(policy.parent) == before


def test_a_policy_may_extend_a_file_beside_it(open_admin: Callable[..., TestClient], bank: Path, policy: Path) -> None:
    (policy.parent / "base.yaml").write_text(policy_text("base", action="block"))
    client = open_admin(bank, policy)
    response = client.post("/admin/policy/promote", json={"yaml": "name: mine\nextends: base.yaml\n"})
    assert response.status_code == 200
    assert slot(client).policy.rules[0].action == "block"


def test_a_policy_by_hand_may_hold_what_a_sent_one_may_not(
    open_admin: Callable[..., TestClient], bank: Path, policy: Path
) -> None:
    (policy.parent.parent / "above.yaml").write_text(policy_text("above"))
    by_hand = "name: &n mine\nextends: ../above.yaml\nrefusal: *n\n"
    policy.write_text(by_hand)
    client = open_admin(bank, policy)
    assert client.post("/admin/policy/promote", json={"yaml": policy_text("second")}).status_code == 200
    assert client.post("/admin/policy/rollback").status_code == 200
    assert policy.read_text() == by_hand


def test_without_a_policy_file_nothing_can_be_put_in_place(open_admin: Callable[..., TestClient], bank: Path) -> None:
    for given in (None, Path("strict")):
        client = open_admin(bank, given)
        for response in (
            client.post("/admin/policy/promote", json={"yaml": policy_text()}),
            client.post("/admin/policy/rollback", json={}),
        ):
            assert error(response)["code"] == "no_policy_file"
        assert client.get("/admin/policy").json()["source"] is None
        assert client.post("/admin/policy/validate", json={"yaml": policy_text()}).json()["valid"] is True
        assert not Path("strict.versions").exists()
    assert error(open_admin(bank).post("/admin/policy/reload"))["code"] == "no_policy_file"


def test_a_link_is_not_written_over(open_admin: Callable[..., TestClient], bank: Path, policy: Path) -> None:
    link = policy.with_name("link.yaml")
    link.symlink_to(policy.name)
    client = open_admin(bank, link)
    assert "is a link" in error(client.post("/admin/policy/promote", json={"yaml": policy_text("new")}))["message"]
    assert link.is_symlink()


def test_an_altered_copy_is_not_put_back(open_admin: Callable[..., TestClient], bank: Path, policy: Path) -> None:
    client = open_admin(bank, policy)
    client.post("/admin/policy/promote", json={"yaml": policy_text("second")})
    first = client.get("/admin/policy").json()["history"][0]["sha256"]
    (policy.parent / "house.yaml.versions" / f"{first}.yaml").write_text(policy_text("forged"))
    assert "was altered" in error(client.post("/admin/policy/rollback"))["message"]
    assert slot(client).policy.name == "second"


# ---- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/bank/promote", {}),
        ("/admin/bank/promote", {"version": 1}),
        ("/admin/bank/promote", {"version": "1", "source": "/etc"}),
        ("/admin/bank/rollback", {"to": "x", "force": True}),
        ("/admin/policy/promote", {"yaml": ""}),
        ("/admin/policy/validate", {"yaml": "x" * (MAX_POLICY + 1)}),
        ("/admin/policy/rollback", []),
    ],
)
def test_malformed_bodies_are_refused(
    open_admin: Callable[..., TestClient], store: VersionStore, policy: Path, path: str, body: Any
) -> None:
    error(open_admin(store.folder, policy).post(path, json=body), 400)


def test_without_a_guard_there_is_nothing_to_administer(make_app: Callable[..., Any], bank: Path) -> None:
    app = make_app(FileEngine.start(bank, None, Metrics()), bank=bank, admin_keys=KEY)
    with TestClient(app, headers=ADMIN) as client:
        app.state.services.slot.fail("still loading")
        error(client.get("/admin/bank"), 503)
        error(client.get("/admin/policy"), 503)
        for path in ("bank/reload", "bank/rollback", "policy/reload", "policy/rollback"):
            error(client.post(f"/admin/{path}"), 503)


def test_every_route_documents_its_answers(open_admin: Callable[..., TestClient], bank: Path) -> None:
    schema = open_admin(bank).app.openapi()  # type: ignore[attr-defined]
    paths = [path for path in schema["paths"] if path.startswith(("/admin/", "/v1/features", "/v1/traces"))]
    assert len(paths) == 18
    for path in paths:
        for operation in schema["paths"][path].values():
            assert operation["summary"]
            assert {"200", "400", "401", "403", "404", "409", "413", "429", "503"} <= set(operation["responses"])
            assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
