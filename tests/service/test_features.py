"""`/v1/features`: searched and shown as the bank in use has them, with what reviewers say."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from feature_bank.review import Draft, append_reviews, review_file
from feature_bank.search import MAX_QUERY
from guard.metrics import Metrics
from tests.service.file_engine import FileEngine

URL = "/v1/features"


@pytest.fixture
def small(make_app: Callable[..., Any], bank: Path) -> Iterator[TestClient]:
    """A server on the bank of two features."""
    with TestClient(make_app(FileEngine.start(bank, None, Metrics()), bank=bank)) as client:
        yield client


def ids(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    return [feature["id"] for feature in response.json()["data"]]


def test_all_features_are_listed_the_best_first(small: TestClient) -> None:
    body = small.get(URL).json()
    assert (body["object"], body["total"], body["limit"], body["offset"]) == ("list", 2, 20, 0)
    assert [(feature["id"], feature["auroc"]) for feature in body["data"]] == [("L1/1", 0.9), ("L1/0", 0.6)]
    assert body["bank"].startswith("tiny@1+")


def test_features_are_found_by_text_and_by_tag(small: TestClient) -> None:
    assert ids(small.get(URL, params={"q": "always"})) == ["L1/1"]
    assert ids(small.get(URL, params={"q": "L1/0"}))[0] == "L1/0"
    assert ids(small.get(URL, params={"q": '"never on"'})) == ["L1/0"]
    assert ids(small.get(URL, params={"q": "nowhere"})) == []
    assert ids(small.get(URL, params={"q": "  "})) == ["L1/1", "L1/0"]
    assert ids(small.get(URL, params={"domain": "politics"})) == ["L1/0"]
    assert ids(small.get(URL, params={"domain": "politics", "q": "always"})) == []
    assert ids(small.get(URL, params={"layer": 2})) == []
    found = small.get(URL, params={"q": "bird"}).json()["data"][0]
    assert found["found_in"] == ["evidence"]
    assert found["relevance"] is not None


def test_pages_cover_every_feature_once(client: TestClient) -> None:
    whole = client.get(URL, params={"limit": 100}).json()
    pages = [ids(client.get(URL, params={"limit": 7, "offset": offset})) for offset in range(0, 42, 7)]
    assert [one for page in pages for one in page] == [feature["id"] for feature in whole["data"]][:42]
    beyond = client.get(URL, params={"offset": whole["total"]}).json()
    assert (beyond["data"], beyond["total"]) == ([], whole["total"])


def test_a_concept_and_a_layer_of_the_shipped_bank_are_found(client: TestClient, engine: Any) -> None:
    feature = next(feature for feature in engine.bank.features if feature.concepts)
    params = {"concept": feature.concepts[0], "layer": feature.layer, "limit": 100}
    assert feature.id in ids(client.get(URL, params=params))


def test_features_are_chosen_by_review_score_and_admission(small: TestClient, bank: Path) -> None:
    draft = Draft.model_validate({"feature": "L1/0", "verdict": "reject", "reviewer": "Ada", "reason": "noise"})
    append_reviews(bank, [draft])
    assert ids(small.get(URL, params={"status": "rejected"})) == ["L1/0"]
    assert ids(small.get(URL, params={"status": "unreviewed"})) == ["L1/1"]
    assert ids(small.get(URL, params={"status": "accepted"})) == []
    assert ids(small.get(URL, params={"min_auroc": 0.9})) == ["L1/1"]
    assert ids(small.get(URL, params={"min_auroc": 0.5, "domain": "politics"})) == ["L1/0"]
    assert ids(small.get(URL, params={"min_auroc": 0.7, "domain": "politics"})) == []
    assert ids(small.get(URL, params={"admitted": True})) == ["L1/1", "L1/0"]
    assert ids(small.get(URL, params={"admitted": False})) == []


def test_no_feature_has_enough_of_a_score_that_none_has(client: TestClient, engine: Any, tmp_path: Path) -> None:
    bare = [feature.model_copy(update={"scores": {}}) for feature in engine.bank.features]
    engine.bank = dataclasses.replace(engine.bank, features=tuple(bare), content_hash="0" * 64)
    assert ids(client.get(URL, params={"min_auroc": 0.0})) == []
    assert len(ids(client.get(URL))) == 20


def test_every_order_shows_every_feature_once_and_what_has_no_score_last(client: TestClient, engine: Any) -> None:
    known = {feature.id: feature for feature in engine.bank.features}
    for sort in ("auroc", "fidelity", "density", "id", "layer"):
        shown = client.get(URL, params={"sort": sort, "limit": 1000}).json()["data"]
        assert {feature["id"] for feature in shown} == set(known)
        assert len(shown) == len(known)
        if sort in ("auroc", "fidelity", "density"):
            values = [feature[sort] for feature in shown]
            scored = [value for value in values if value is not None]
            assert values[: len(scored)] == sorted(scored, reverse=True)
        else:
            places = [(one["layer"], one["index"]) if sort == "id" else one["layer"] for one in shown]
            assert places == sorted(places)
    assert ids(client.get(URL)) == ids(client.get(URL, params={"sort": "auroc"}))


def test_an_order_goes_before_relevance(small: TestClient) -> None:
    assert ids(small.get(URL, params={"q": "bird", "sort": "id"})) == ["L1/0", "L1/1"]
    assert ids(small.get(URL, params={"q": "bird", "sort": "auroc"})) == ["L1/1", "L1/0"]


def test_a_summary_says_what_kind_of_feature_it_is_and_how_well_it_is_explained(
    client: TestClient, engine: Any
) -> None:
    shown = {one["id"]: one for one in client.get(URL, params={"limit": 1000}).json()["data"]}
    for feature in engine.bank.features:
        one = shown[feature.id]
        assert (one["kind"], one["direction"], one["admitted"]) == (feature.kind, feature.direction, feature.admitted)
        by_level = {score.level: score.corr for score in reversed(feature.fidelity)}
        assert one["fidelity"] == by_level.get("segment", by_level.get("token"))


def test_a_feature_is_shown_with_all_that_is_recorded(client: TestClient, engine: Any) -> None:
    feature = max(engine.bank.features, key=lambda one: len(one.evidence))
    body = client.get(f"{URL}/{feature.id}").json()
    assert body["feature"] == feature.model_dump(mode="json")
    assert body["feature"]["evidence"]
    assert body["effective"]["explanation"] == feature.explanation
    holding = {domain: head for domain, head in engine.bank.heads.items() if feature.id in head.features}
    assert {domain: part["weight"] for domain, part in body["heads"].items()} == {
        domain: head.weights[head.features.index(feature.id)] for domain, head in holding.items()
    }
    assert (body["object"], body["bank"], body["reviews"]) == ("feature", engine.bank.version, [])
    assert client.get(f"{URL}/{quote(feature.id, safe='')}").json() == body


@pytest.mark.parametrize("name", ["L99/1", "L1", "L1/2/3", "../../etc", "x" * 5000, "%00", "%ff", "ä"])
def test_an_unknown_feature_is_not_found(small: TestClient, name: str) -> None:
    response = small.get(f"{URL}/{name}")
    assert response.status_code == 404
    assert len(response.json()["error"]["message"]) < 300


@pytest.mark.parametrize(
    "params",
    [
        {"limit": 0},
        {"limit": 1001},
        {"status": "new"},
        {"min_auroc": 1.1},
        {"admitted": "perhaps"},
        {"sort": "size"},
        {"limit": "many"},
        {"offset": -1},
        {"layer": -1},
        {"domain": "weather"},
        {"q": "x" * (MAX_QUERY + 1)},
        {"q": '""'},
        {"q": " ".join(map(str, range(100)))},
    ],
)
def test_what_cannot_be_looked_for_is_refused(small: TestClient, params: dict[str, Any]) -> None:
    response = small.get(URL, params=params)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert next(iter(params)) in response.json()["error"]["param"]


def test_an_unknown_concept_is_not_found(small: TestClient) -> None:
    response = small.get(URL, params={"concept": "weather/rain"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "concept_not_found"


@pytest.mark.parametrize("query", ["NEAR(a b)", "a* OR b", "'; DROP TABLE words; --", "\x00\x01", "鳥", "\ud800", "%"])
def test_no_character_of_a_query_has_a_meaning_of_its_own(small: TestClient, query: str) -> None:
    response = small.get(URL, params={"q": query.encode(errors="surrogatepass").decode(errors="replace")})
    assert response.status_code in (200, 400)


def test_reviews_are_shown_and_searched_at_once(small: TestClient, bank: Path) -> None:
    assert small.get(f"{URL}/L1/1").json()["reviews"] == []
    overrides = {"explanation": "herons at the river"}
    draft = Draft.model_validate(
        {"feature": "L1/1", "verdict": "relabel", "overrides": overrides, "reviewer": "Ada", "reason": "seen"}
    )
    append_reviews(bank, [draft])
    body = small.get(f"{URL}/L1/1").json()
    assert body["effective"] == {
        "domains": ["violence"],
        "concepts": [],
        "explanation": "herons at the river",
        "status": "accepted",
        "reviewer": "Ada",
        "time": body["reviews"][0]["time"],
    }
    assert body["feature"]["explanation"] == "always on"
    assert ids(small.get(URL, params={"q": "herons"})) == ["L1/1"]


def test_reviews_that_cannot_be_read_do_not_hide_the_bank(small: TestClient, bank: Path) -> None:
    review_file(bank).write_text("no json\nat all\n")
    assert small.get(f"{URL}/L1/1").json()["effective"]["status"] == "unreviewed"


def test_another_bank_is_searched_as_soon_as_it_is_in_use(
    make_app: Callable[..., Any], bank: Path, write_bank: Callable[..., Path]
) -> None:
    key = "an-admin-key-for-tests"
    app = make_app(FileEngine.start(bank, None, Metrics()), bank=bank, admin_keys=key)
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
        assert ids(client.get(URL, params={"q": "herons"})) == []
        write_bank(bank, explanation="herons")
        assert ids(client.get(URL, params={"q": "herons"})) == [], "the bank in use is meant, not the one on the disk"
        assert client.post("/admin/bank/reload").json()["result"] == "ok"
        assert ids(client.get(URL, params={"q": "herons"})) == ["L1/1"]


def test_nothing_here_needs_torch() -> None:
    modules = (
        "service.routes.features, service.routes.admin, service.routes.traces, service.reload, "
        "service.routes.compare, service.routes.about, service.routes.audit, service.routes.reviews"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
