"""`POST /admin/reviews`: a review is there at once and after a restart, and only administrators give one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_bank import journal
from feature_bank.bank import Bank
from feature_bank.review import load_reviews, review_file
from guard.metrics import Metrics
from tests.service.file_engine import FileEngine

KEY, CLIENT_KEY = "an-admin-key-for-tests", "a-client-key-for-tests"
ADMIN = {"Authorization": f"Bearer {KEY}"}
URL = "/admin/reviews"


def body(**changes: Any) -> dict[str, Any]:
    return {"feature": "L1/1", "verdict": "reject", "reviewer": "Ada", "reason": "fires on birds", **changes}


@pytest.fixture
def start(make_app: Callable[..., Any], bank: Path) -> Callable[..., TestClient]:
    def make(place: Path = bank) -> TestClient:
        engine = FileEngine.start(place, None, Metrics())
        return TestClient(make_app(engine, bank=place, api_keys=CLIENT_KEY, admin_keys=KEY), headers=ADMIN)

    return make


@pytest.fixture
def admin(start: Callable[..., TestClient]) -> Iterator[TestClient]:
    with start() as client:
        yield client


def shown(client: TestClient, feature: str = "L1/1") -> dict[str, Any]:
    return dict(client.get(f"/v1/features/{feature}").json())


def test_a_review_is_shown_at_once_and_after_a_restart(start: Callable[..., TestClient], bank: Path) -> None:
    with start() as client:
        assert shown(client)["effective"]["status"] == "unreviewed"
        response = client.post(URL, json=body())
        assert response.status_code == 200, response.text
        added = response.json()
        assert added["object"] == "review"
        assert added["review"]["bank"] == Bank.load(bank).version
        assert (added["review"]["reviewer"], added["review"]["reason"]) == ("Ada", "fires on birds")
        assert (added["effective"]["status"], added["effective"]["reviewer"]) == ("rejected", "Ada")
        now = shown(client)
        assert (now["effective"], now["reviews"]) == (added["effective"], [added["review"]])
        listed = client.get("/v1/features", params={"status": "rejected"}).json()["data"]
        assert [feature["id"] for feature in listed] == ["L1/1"]
    with start() as client:
        assert shown(client) == now


def test_a_relabelled_feature_is_found_by_its_new_words(admin: TestClient) -> None:
    overrides = {"explanation": "herons at the river", "domains": ["politics"]}
    response = admin.post(URL, json=body(verdict="relabel", overrides=overrides, reason=""))
    assert response.status_code == 200, response.text
    assert response.json()["effective"]["explanation"] == "herons at the river"
    for params in ({"q": "herons"}, {"domain": "politics", "status": "accepted"}):
        assert [one["id"] for one in admin.get("/v1/features", params=params).json()["data"]] == ["L1/1"]


def test_a_review_is_undone_by_a_further_one_and_nothing_is_deleted(admin: TestClient, bank: Path) -> None:
    for verdict in ("reject", "accept", "note"):
        assert admin.post(URL, json=body(verdict=verdict)).status_code == 200
    assert shown(admin)["effective"]["status"] == "accepted"
    assert [review.verdict for review in load_reviews(bank).reviews] == ["reject", "accept", "note"]


def test_reviews_given_at_once_are_all_kept(admin: TestClient, bank: Path) -> None:
    reasons = [f"reason {number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda reason: admin.post(URL, json=body(reason=reason)), reasons))
    assert {answer.status_code for answer in answers} == {200}
    log = load_reviews(bank)
    assert sorted(review.reason for review in log.reviews) == sorted(reasons)
    assert (len({review.time for review in log.reviews}), log.torn) == (24, ())


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"feature": "L9/9"}, 404, "feature"),
        ({"feature": "birds"}, 400, "feature"),
        ({"verdict": "like"}, 400, "verdict"),
        ({"reason": ""}, 400, None),
        ({"reviewer": "  "}, 400, "reviewer"),
        ({"reviewer": "a\x00b"}, 400, "reviewer"),
        ({"verdict": "relabel"}, 400, None),
        ({"overrides": {"explanation": "birds"}}, 400, None),
        ({"verdict": "relabel", "overrides": {"domains": ["weather"]}}, 400, "overrides.domains[0]"),
        ({"verdict": "relabel", "overrides": {"concepts": ["weather/rain"]}}, 404, "overrides.concepts"),
        ({"time": "now"}, 400, "time"),
        ({"bank": "other"}, 400, "bank"),
    ],
)
def test_what_is_no_review_changes_nothing(
    admin: TestClient, bank: Path, changes: dict[str, Any], status: int, param: str | None
) -> None:
    response = admin.post(URL, json=body(**changes))
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert load_reviews(bank).reviews == ()


def test_a_bank_that_cannot_be_written_is_refused_in_words(
    admin: TestClient, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "open", refuse)
        response = admin.post(URL, json=body())
    assert (response.status_code, response.json()["error"]["code"]) == (409, "bank_not_writable")
    assert "Permission denied" in response.json()["error"]["message"]
    assert load_reviews(bank).reviews == ()


def test_a_log_that_is_damaged_is_left_as_it_is(admin: TestClient, bank: Path) -> None:
    review_file(bank).write_text("no json\nat all\n")
    response = admin.post(URL, json=body())
    assert (response.status_code, response.json()["error"]["code"]) == (409, "refused")
    assert review_file(bank).read_text() == "no json\nat all\n"


@pytest.mark.parametrize("headers", [{"Authorization": ""}, {"Authorization": f"Bearer {CLIENT_KEY}"}])
def test_only_an_administrator_reviews(admin: TestClient, bank: Path, headers: dict[str, str]) -> None:
    assert admin.post(URL, json=body(), headers=headers).status_code in (401, 403)
    assert load_reviews(bank).reviews == ()


def test_a_review_is_logged_by_its_key_and_not_by_its_words(admin: TestClient, log: Any) -> None:
    admin.post(URL, json=body(reason="confidential"))
    assert '"action": "review"' in log.getvalue()
    assert "confidential" not in log.getvalue()
    assert "Ada" not in log.getvalue()
