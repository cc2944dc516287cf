"""The OpenAPI document is valid and complete, and what the server answers has the shapes that it states."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import structlog
from fastapi.testclient import TestClient
from pydantic import BaseModel

from guard.metrics import Metrics
from service import schemas_responses as shapes
from service.app import create_app
from service.routes.traces import TraceResponse
from service.schemas_about import About, Stats
from service.schemas_compare import Choices, Comparison
from service.schemas_errors import ErrorResponse
from service.schemas_features import FeatureDetail, FeatureList
from service.settings import Settings
from tests.service.file_engine import FileEngine

CHAT = {"model": "sailguard", "messages": [{"role": "user", "content": "one two three"}]}
TEXTS = {"model": "sailguard", "prompt": ["one two", "three"]}
OPEN = {"/healthz", "/readyz", "/metrics"}


@pytest.fixture(params=["chats", "judges"])
def document(request: pytest.FixtureRequest, make_app: Callable[..., Any], bank: Path) -> dict[str, Any]:
    """The document of a server that answers chats, and of one that only judges."""
    if request.param == "chats":
        app = make_app()
    else:
        logger = structlog.wrap_logger(structlog.PrintLogger(io.StringIO()))
        engine: Any = FileEngine.start(bank, None, Metrics())
        app = create_app(engine, Settings(port=0, allowed_hosts="testserver"), generates=False, logger=logger)
    with TestClient(app) as client:
        response = client.get("/openapi.json")
    assert response.status_code == 200
    return dict(response.json())


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for below in part.values():
            yield from references(below)
    elif isinstance(part, list):
        for below in part:
            yield from references(below)


def test_document_is_valid_openapi_and_refers_to_what_it_holds(document: dict[str, Any]) -> None:
    from schemathesis.specs.openapi.definitions import OPENAPI_31

    assert document["openapi"].startswith("3.1.")
    jsonschema_rs.validator_for(OPENAPI_31).validate(document)
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema_rs.meta.validate(schema)
    named = set(references(document))
    assert named <= {f"#/components/schemas/{name}" for name in schemas}
    unused = {name for name in schemas if f"#/components/schemas/{name}" not in named}
    assert unused == set(), "nothing is defined that nothing refers to"


def test_document_names_the_server_its_licence_and_its_tags(document: dict[str, Any]) -> None:
    assert document["info"]["title"] == "sailguard"
    assert document["info"]["version"]
    assert document["info"]["description"]
    assert document["servers"] == [{"url": "/", "description": "This server."}]
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}
    assert tags == {tag for _, operation in operations(document) for tag in operation["tags"]}


def test_every_operation_is_described_and_says_what_it_answers(document: dict[str, Any]) -> None:
    names = []
    for name, operation in operations(document):
        assert operation["summary"], name
        assert operation["description"], name
        assert len(operation["tags"]) == 1, name
        names.append(operation["operationId"])
        responses = operation["responses"]
        assert "422" not in responses, "what does not fit is answered with 400"
        if name != "GET /v1/events":
            content = responses["200"]["content"]
            assert all(media["schema"] for media in content.values()), name
        refusals = {status for status in responses if status != "200"}
        assert refusals >= {"403", "500"}, name
        if name.partition(" ")[2] not in OPEN:
            assert refusals >= {"400", "401", "404", "408", "413", "429", "503", "504"}, name
        for status in refusals:
            content = responses[status]["content"]
            assert content == {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}, name
            assert responses[status]["description"]
        for parameter in operation.get("parameters", ()):
            assert parameter.get("schema"), name
    assert len(names) == len(set(names))


def test_every_field_of_a_request_to_judge_or_answer_is_described(document: dict[str, Any]) -> None:
    bodies = {
        reference.rpartition("/")[2]
        for name, operation in operations(document)
        if not name.startswith("POST /admin") and name != "POST /v1/traces"
        for reference in references(operation.get("requestBody"))
    }
    assert "ModerationRequest" in bodies
    for body in bodies:
        schema = document["components"]["schemas"][body]
        assert schema["additionalProperties"] is False
        assert schema["description"]
        for name, field in schema["properties"].items():
            assert field.get("description"), f"{body}.{name}"


def test_request_schemas_state_the_bounds_that_hold(make_app: Callable[..., Any]) -> None:
    with TestClient(make_app()) as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
        for body, name, whole in (
            ("ChatRequest", "stop", CHAT),
            ("CompletionRequest", "stop", TEXTS),
            ("CompletionRequest", "prompt", TEXTS),
            ("ModerationRequest", "input", {}),
            ("ChatRequest", "messages", CHAT),
        ):
            field = schemas[body]["properties"][name]
            most = next(form["maxItems"] for form in [field, *field.get("anyOf", ())] if "maxItems" in form)
            item: Any = {"role": "user", "content": "x"} if name == "messages" else "x"
            path = {"Chat": "chat/completions", "Comp": "completions", "Mode": "moderations"}[body[:4]]
            for count, status in ((most, 200), (most + 1, 400)):
                response = client.post(
                    f"/v1/{path}",
                    json={**whole, name: [item] * count, "max_tokens": 1} if whole else {name: [item] * count},
                )
                # The chat of so many words does not fit the fake model, which is no matter of the schema.
                fits = name == "messages" and status == 200
                assert response.status_code == status or fits, (body, name, count)
                if fits:
                    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_keys_are_declared_where_they_are_asked_for(make_app: Callable[..., Any]) -> None:
    with TestClient(make_app()) as client:
        free = client.get("/openapi.json").json()
    with TestClient(make_app(api_keys="right")) as client:
        assert client.get("/openapi.json").status_code == 401
        keyed = client.get("/openapi.json", headers={"Authorization": "Bearer right"}).json()
        for document in (free, keyed):
            (scheme,) = document["components"]["securitySchemes"].values()
            assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
        assert not any("security" in operation for _, operation in operations(free))
        for name, operation in operations(keyed):
            method, _, path = name.partition(" ")
            assert ("security" in operation) is (path not in OPEN), name
            response = client.request(method, path.replace("{name}", "x").replace("{feature_id}", "x"))
            assert (response.status_code == 401) is ("security" in operation), name


def test_document_is_the_same_each_time(make_app: Callable[..., Any]) -> None:
    app = make_app()
    with TestClient(app) as client:
        first = client.get("/openapi.json").text
        client.post("/v1/chat/completions", json=CHAT)
        assert client.get("/openapi.json").text == first
    assert json.loads(first) == app.openapi()


# ---- what is answered --------------------------------------------------------------------------------------------


def hold(model: type[BaseModel], body: Any) -> None:
    """`body` is one of `model`, with nothing in it that the model does not name."""
    assert model.model_validate(body).model_dump(mode="json", exclude_unset=True) == body


@pytest.mark.parametrize("text", ["one two three", "one BLOCK two", ""])
@pytest.mark.parametrize("n", [None, 3])
@pytest.mark.parametrize("usage", [None, False, True])
def test_answers_have_the_documented_shapes(
    client: TestClient, read_events: Callable[[str], list[Any]], text: str, n: int | None, usage: bool | None
) -> None:
    options = None if usage is None else {"include_usage": usage}
    for path, whole, chunk, body in (
        (
            "chat/completions",
            shapes.ChatCompletion,
            shapes.ChatCompletionChunk,
            {"messages": [{"role": "user", "content": text}]},
        ),
        ("completions", shapes.Completion, shapes.CompletionChunk, {"prompt": [text or "one", "two"]}),
    ):
        asked = {"model": "sailguard", "n": n, **body}
        response = client.post(f"/v1/{path}", json=asked)
        assert response.status_code == 200
        hold(whole, response.json())
        streamed = client.post(f"/v1/{path}", json={**asked, "stream": True, "stream_options": options})
        *events, done = read_events(streamed.text)
        assert done == "[DONE]"
        for event in events:
            hold(chunk, event)


def test_judgements_have_the_documented_shapes(client: TestClient) -> None:
    for texts in ("calm", ["violence politics", "", "terror"]):
        hold(shapes.Moderation, client.post("/v1/moderations", json={"input": texts}).json())
    for text in ("", "violence", "one two three"):
        hold(TraceResponse, client.post("/v1/traces", json={"input": text}).json())
    hold(Comparison, client.post("/v1/compare", json={"texts": ["calm", "violence"]}).json())


def test_what_is_shown_has_the_documented_shapes(client: TestClient) -> None:
    features = client.get("/v1/features", params={"limit": 5}).json()
    hold(FeatureList, features)
    assert features["data"]
    for feature in features["data"]:
        hold(FeatureDetail, client.get(f"/v1/features/{feature['id']}").json())
    hold(About, client.get("/v1/about").json())
    hold(Stats, client.get("/v1/stats").json())
    hold(Choices, client.get("/v1/compare").json())
    models = client.get("/v1/models").json()
    hold(shapes.ModelList, models)
    for model in models["data"]:
        hold(shapes.ModelEntry, client.get(f"/v1/models/{model['id']}").json())
    hold(shapes.HealthResponse, client.get("/healthz").json())
    hold(shapes.Readiness, client.get("/readyz").json())


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", {}, 400),
        ("POST", "/v1/chat/completions", {**CHAT, "model": "other"}, 404),
        ("POST", "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "one CRASH"}]}, 500),
        ("POST", "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "word " * 64}]}, 400),
        ("POST", "/v1/completions", {**TEXTS, "prompt": []}, 400),
        ("POST", "/v1/completions", {**TEXTS, "prompt": "one CRASH"}, 500),
        ("POST", "/v1/moderations", {"input": 1}, 400),
        ("POST", "/v1/traces", {"input": "x", "role": "x"}, 400),
        ("GET", "/v1/models/other", None, 404),
        ("GET", "/v1/features/other", None, 404),
        ("GET", "/v1/features?limit=0", None, 400),
        ("GET", "/v1/features?sort=size", None, 400),
        ("GET", "/v1/features?min_auroc=2", None, 400),
        ("POST", "/v1/compare", {"texts": []}, 400),
        ("POST", "/v1/compare", {"texts": ["one"], "left": {"bank": "other"}}, 404),
        ("POST", "/v1/compare", {"texts": ["one"], "left": {"yaml": "rules: 1"}}, 409),
        ("POST", "/v1/compare", {"texts": ["one"], "left": {"yaml": "rules: []", "policy": "strict"}}, 400),
        ("GET", "/admin/bank", None, 403),
        ("POST", "/admin/reviews", {}, 403),
        ("GET", "/admin/audit", None, 403),
        ("GET", "/admin/audit/history", None, 403),
        ("GET", "/admin/spool", None, 403),
        ("POST", "/admin/spool/1/marks", {}, 403),
        ("GET", "/ui/nothing.js", None, 404),
        ("GET", "/nowhere", None, 404),
        ("PUT", "/v1/models", None, 405),
    ],
)
def test_refusals_have_the_documented_shape(
    make_app: Callable[..., Any], method: str, path: str, body: Any, status: int
) -> None:
    with TestClient(make_app(), raise_server_exceptions=False) as client:
        response = client.request(method, path, json=body)
    assert response.status_code == status
    hold(ErrorResponse, response.json())


def test_server_that_is_not_ready_refuses_in_the_documented_shape(make_app: Callable[..., Any]) -> None:
    def load(_: object) -> Any:
        raise ValueError("no model")

    with TestClient(make_app(load)) as client:
        for method, path in (
            *(("GET", path) for path in ("/readyz", "/v1/models", "/v1/models/x", "/v1/features")),
            *(("GET", path) for path in ("/v1/about", "/v1/stats", "/v1/compare")),
            *(("POST", f"/v1/{path}") for path in ("chat/completions", "completions", "moderations", "traces")),
        ):
            body = {"chat/completions": CHAT, "completions": TEXTS}.get(path.removeprefix("/v1/"), {"input": "x"})
            response = client.request(method, path, json=body if method == "POST" else None)
            assert response.status_code == 503, path
            hold(ErrorResponse, response.json())
        hold(shapes.HealthResponse, client.get("/healthz").json())
