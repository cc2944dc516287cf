"""`train explain`, run for real against servers on the loopback interface: a scripted one and the project's own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feature_bank import shipped_bank_path
from guard.metrics import Metrics
from service.cli import build_app
from tests.training.endpoint_server import ScriptedServer, fail, say
from training.explain.endpoint import ChatEndpoint
from training.explain.interface import Excerpt, FeatureEvidence
from training.explain.material import MATERIAL_FILE, Material, save_material
from training.simulation.llm import LlmSimulator, SegmentText
from training.simulation.prompts import Level

IDS = ("L1/0", "L1/1")
SEGMENTS = 6
LEVELS: tuple[Level, ...] = ("token", "segment")


def material(id_: str) -> Material:
    shown = Excerpt(tokens=("The", " old", " ship", f" {id_}"), activations=(0.0, 0.0, 0.9, 0.0))
    quiet = Excerpt(tokens=("The", " old", " cart"), activations=(0.0, 0.0, 0.0), reason="lookalike")
    segments = tuple(
        SegmentText(tokens=("A", word, f" {row}"), activations=(0.0, fires, 0.0), text=f"A{word} {row}")
        for row in range(SEGMENTS)
        for word, fires in ((" ship", 0.8), (" cart", 0.0))
    )
    return Material(evidence=FeatureEvidence(id=id_, positives=(shown,), negatives=(quiet,)), segments=segments)


@pytest.fixture
def explain(tmp_path: Path, write_bank: Callable[..., Path]) -> Callable[..., Any]:
    """Run the command on a bank of two features; `result.stdout` and `result.stderr` are apart."""
    bank = write_bank(tmp_path / "bank")
    save_material(tmp_path / "work" / MATERIAL_FILE, [material(id_) for id_ in IDS])

    def run(url: str, *more: object, model: str = "model") -> Any:
        folders = ["--bank", bank, "--work", tmp_path / "work", "--out", tmp_path / "out.jsonl"]
        arguments = ["train", "explain", *folders, "--endpoint", url, "--model", model, *more]
        return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])

    return run


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def answer(body: Any) -> str:
    asked = body["messages"][-1]["content"]
    if asked.startswith("Active:"):
        return '{"explanation": "old ships"}'
    return json.dumps({str(row + 1): int(row % 2 == 0) for row in range(2 * SEGMENTS)})


def test_explanations_and_scores_are_written_and_nothing_is_asked_twice(
    explain: Callable[..., Any], tmp_path: Path
) -> None:
    with ScriptedServer(usual=say(answer)) as server:
        result = explain(server.url, "--simulate", "segment", "--json")
        calls = len(server.bodies)
        explain(server.url, "--simulate", "segment", "--max-calls", 0)
        assert len(server.bodies) == calls
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["explained"] == 2
    assert [row["id"] for row in rows(tmp_path)] == list(IDS)
    for row in rows(tmp_path):
        assert row["explanation"] == "old ships"
        assert [(score["level"], score["corr"], score["missing"]) for score in row["scores"]] == [("segment", 1.0, 0)]


def test_dry_run_writes_and_sends_nothing(explain: Callable[..., Any], tmp_path: Path) -> None:
    with ScriptedServer() as server:
        result = explain(server.url, "--simulate", "both", "--dry-run", "--json")
    assert server.bodies == []
    assert not (tmp_path / "out.jsonl").exists()
    assert {step: cost["calls"] for step, cost in json.loads(result.stdout).items()} == {
        "explain": 2,
        "token": 1,  # the explanation that stands in is the same for both, and so is the text
        "segment": 1,
    }


def test_cap_ends_the_command_with_what_is_finished(explain: Callable[..., Any], tmp_path: Path) -> None:
    with ScriptedServer(usual=say(answer)) as server:
        result = explain(server.url, "--max-calls", 1)
    assert result.exit_code == 2
    assert "the cap of 1 calls is reached" in result.output
    assert [row["id"] for row in rows(tmp_path)] == ["L1/0"]


def test_features_are_chosen_by_number_or_id(explain: Callable[..., Any], tmp_path: Path) -> None:
    with ScriptedServer(usual=say(answer)) as server:
        explain(server.url, "--features", "1")
        assert [row["id"] for row in rows(tmp_path)] == ["L1/0"]
        explain(server.url, "--features", "L1/1, L1/0,L1/1")
        assert [row["id"] for row in rows(tmp_path)] == ["L1/1", "L1/0"]
        for wrong in ("L9/9", "0", " ,", "9" * 5000):
            result = explain(server.url, "--features", wrong)
            assert result.exit_code == 2
            assert "--features: " in result.output


def test_wrong_folder_and_wrong_address_are_named(explain: Callable[..., Any], tmp_path: Path) -> None:
    result = explain("ftp://host/v1")
    assert "give an address such as http" in result.output
    with ScriptedServer(usual=fail(401, "who are you?")) as server:
        result = explain(server.url)
    assert "check the API key" in result.output
    assert rows(tmp_path) == []
    (tmp_path / "work" / MATERIAL_FILE).unlink()
    result = explain("http://127.0.0.1:9/v1")
    assert "must be the work folder" in result.output


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not shipped_bank_path().exists(), reason="the shipped bank is not in place")
def test_own_server_with_the_embedded_model_answers_is_counted_and_kept(
    explain: Callable[..., Any], tmp_path: Path, serve: Callable[..., str], embedded: Any, metrics: Metrics
) -> None:
    """A model of 135M parameters rarely writes the JSON that it is asked for: then its answers are missing."""
    from guard.core import Guard
    from guard.serving import ServingGuard
    from service.engine import TransformersEngine

    def generated() -> float:
        return metrics.registry.get_sample_value("sailguard_tokens_generated_total") or 0.0

    segments = {id_: material(id_).segments for id_ in IDS}
    guess = dict.fromkeys(IDS, "ships of any age")
    serving = ServingGuard(Guard.from_bank(metrics=metrics), embedded.model, embedded.tokenizer)
    with contextlib.closing(TransformersEngine(serving, embedded.model_id)) as engine:
        url = f"{serve(engine, max_new_tokens=40)}/v1"
        result = explain(url, "--json", "--timeout", 300, model="sailguard")
        assert result.exit_code == 0, result.output
        first, summary, spent = rows(tmp_path), json.loads(result.stdout), generated()
        again = json.loads(explain(url, "--json", "--max-calls", 0, model="sailguard").stdout)
        assert (again["calls"], rows(tmp_path), generated()) == (0, first, spent)
        with ChatEndpoint(url, "sailguard", cache=tmp_path / "cache", timeout=300) as endpoint:
            for level in LEVELS:
                before, simulator = generated(), LlmSimulator(endpoint)
                found = simulator.simulate(level, guess, segments)
                assert simulator.simulate(level, guess, segments) == found
                assert found[IDS[0]] == found[IDS[1]]  # the same question, asked once
                assert found[IDS[0]].completion_tokens == generated() - before > 0
                assert len(found[IDS[0]].values) == (6 if level == "token" else 2) * SEGMENTS
    assert summary["stopped"] is None
    assert summary["explained"] + summary["unreadable"] == len(first) == 2
    assert 3 <= summary["calls"] <= 5  # one finds out that the server has no JSON mode; then one or two a feature
    assert summary["estimated_calls"] == 0
    assert summary["completion_tokens"] == spent
    assert summary["prompt_tokens"] > 500
