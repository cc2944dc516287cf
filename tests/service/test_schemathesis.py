"""What the OpenAPI document says of every operation holds, for requests that it allows and for those that it does not.

The stream of events is left out, for it never ends; tests/service/test_events.py has it.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import structlog
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from feature_bank.versions import VersionStore
from guard.metrics import Metrics
from service.app import create_app
from service.settings import Settings
from tests.service.file_engine import FileEngine, policy_text

KEY, ADMIN_KEY = "client-key-for-tests", "admin-key-for-tests"
ENDLESS = "/v1/events"
ADMIN = "^/admin/"
EXAMPLES = 25


@dataclass(slots=True)
class Findings:
    """What came of an attack: answers by operation and status, and what does not agree with the document."""

    answers: dict[str, Counter[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    operations: set[str] = field(default_factory=set)
    """All that were to be attacked."""

    def add(self, event: Any) -> None:
        if isinstance(event, (events.NonFatalError, events.FatalError)):
            self.problems.append(f"{type(event).__name__}: {getattr(event, 'value', None) or event}")
        if not isinstance(event, events.ScenarioFinished):
            return
        recorder = event.recorder
        for name, node in recorder.cases.items():
            response = recorder.find_response(case_id=name)
            if response is None:
                continue
            case = node.value
            self.answers.setdefault(case.operation.label, Counter())[response.status_code] += 1
            for check in recorder.checks.get(name, ()):
                if check.failure_info is not None:
                    request = f"{case.path_parameters} {case.query} {str(case.body)[:400]!r}"
                    said = f"{check.name}: {check.failure_info.failure.message}"
                    self.problems.append(
                        f"{case.operation.label}: {said}\n  sent {request}\n"
                        f"  got {response.status_code} {response.text[:400]!r}"
                    )

    @property
    def statuses(self) -> set[int]:
        return {status for counts in self.answers.values() for status in counts}


def attack(url: str, *, key: str | None = None, of: str | None = None, **checks: Any) -> Findings:
    """Send to the operations whatever the document lets one think of, and check every answer against it.

    of: a pattern for paths, in place of all but the administrators'. checks: how single checks differ.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    document = httpx.get(f"{url}/openapi.json", headers=headers, timeout=20).json()
    for name in ("ChatRequest", "CompletionRequest"):  # or nearly all would end at an unknown model
        if name in document["components"]["schemas"]:
            document["components"]["schemas"][name]["properties"]["model"] = {"enum": ["sailguard"]}
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "base-url": url,
            "headers": headers,
            "request-timeout": 30,
            "workers": 1,
            "suppress-health-check": ["filter_too_much", "too_slow"],
            "generation": {"max-examples": EXAMPLES, "deterministic": True, "database": "none", "no-shrink": True},
            "phases": {"stateful": {"enabled": False}},
            "checks": checks,
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    schema = schema.exclude(path_regex=ADMIN) if of is None else schema.include(path_regex=of)
    findings = Findings()
    for path, methods in document["paths"].items():
        if path != ENDLESS and (re.search(of, path) if of is not None else not re.search(ADMIN, path)):
            findings.operations |= {f"{method.upper()} {path}" for method in methods}
    for event in from_schema(schema.exclude(path=ENDLESS)).execute():
        findings.add(event)
    return findings


@pytest.fixture
def judging(server_thread: Any, log: io.StringIO) -> Iterator[Callable[..., str]]:
    """Start a real server around an engine that answers no chats, and return its address."""
    with contextlib.ExitStack() as stack:

        def start(engine: Any, **settings: Any) -> str:
            chosen = Settings(port=0, watch_seconds=0.0, **settings)
            logger = structlog.wrap_logger(structlog.PrintLogger(log), processors=[structlog.processors.JSONRenderer()])
            app = create_app(engine, chosen, generates=False, logger=logger)
            return str(stack.enter_context(server_thread(app, chosen)))

        yield start


def check(findings: Findings) -> None:
    """No answer was other than documented, and none was an error of the server's."""
    assert not findings.problems, "\n".join([f"{len(findings.problems)} problems", *findings.problems[:20]])
    assert not {status for status in findings.statuses if status >= 500}
    assert set(findings.answers) == findings.operations


def test_server_without_keys_answers_as_documented(serve: Callable[..., str], engine: Any) -> None:
    findings = attack(serve(max_new_tokens=8))
    check(findings)
    for path in ("chat/completions", "completions", "moderations", "traces"):
        counts = findings.answers[f"POST /v1/{path}"]
        assert counts.total() > EXAMPLES
        assert {200, 400} <= set(counts)
    assert {200, 400} <= set(findings.answers["GET /v1/features"])
    assert not engine.overlapped


def test_server_that_only_judges_answers_as_documented(bank: Path, judging: Callable[..., str]) -> None:
    findings = attack(judging(FileEngine.start(bank, None, Metrics()), bank=bank), of="^/(v1/|readyz)")
    check(findings)
    assert {200, 400} <= set(findings.answers["POST /v1/moderations"])


def test_server_with_keys_answers_as_documented_and_asks_for_one_everywhere(serve: Callable[..., str]) -> None:
    findings = attack(serve(api_keys=KEY, admin_keys=ADMIN_KEY, max_new_tokens=8), key=KEY)
    check(findings)
    for operation, counts in findings.answers.items():
        open_to_all = operation.removeprefix("GET ") in ("/healthz", "/readyz", "/metrics")
        assert (401 in counts) is not open_to_all, operation
        if operation.endswith("/v1/compare"):
            assert not {200, 404, 409} & set(counts), "it needs an admin key"
        else:
            assert 200 in counts or "{" in operation, operation


@pytest.mark.parametrize("key", [None, KEY])
def test_admin_is_closed_to_all_other_keys(serve: Callable[..., str], key: str | None) -> None:
    keys = {} if key is None else {"api_keys": KEY, "admin_keys": ADMIN_KEY}
    # Which methods there are is nobody else's business.
    findings = attack(serve(**keys), key=key, of=ADMIN, unsupported_method={"enabled": False})
    check(findings)
    assert findings.statuses == ({403} if key is None else {401, 403})


def test_admin_answers_as_documented(
    judging: Callable[..., str], write_bank: Callable[..., Path], tmp_path: Path
) -> None:
    store = VersionStore(tmp_path / "store")
    for number in range(3):
        store.promote(write_bank(tmp_path / f"bank{number}", explanation=f"version {number}"))
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_text())
    served = FileEngine.start(store.folder, policy, Metrics())
    audit = tmp_path / "audit.db"
    files = {"bank": store.folder, "policy": policy, "audit": audit, "spool": tmp_path / "spool.db"}
    url = judging(served, **files, api_keys=KEY, admin_keys=ADMIN_KEY)
    findings = attack(url, key=ADMIN_KEY, of=ADMIN)
    check(findings)
    named = ("promote", "reviews", "marks")  # a version, a feature or an item that is there is not guessed
    assert all(200 in counts for path, counts in findings.answers.items() if not path.endswith(named))
    assert {404, 400} <= set(findings.answers["POST /admin/bank/promote"])
    # Nothing that was sent has come into use but what had been there before.
    assert VersionStore(store.folder).current in {event.version for event in store.history()}
    judged = httpx.post(
        f"{url}/v1/moderations", json={"input": "a bird"}, headers={"Authorization": f"Bearer {KEY}"}, timeout=20
    )
    assert judged.status_code == 200
