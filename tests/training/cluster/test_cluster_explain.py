"""Features that are explained on a cluster have the records of one process, and one cap holds for all workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from feature_bank.bank import Bank
from feature_bank.errors import DataError
from feature_bank.identity import identify
from service.cli import build_app
from tests.training.cluster.conftest import TwoNodes
from tests.training.cluster.drivers import stop_driver
from tests.training.cluster.samples import RAY, Slowly
from tests.training.endpoint_server import PATIENCE, ScriptedServer, fail, say
from tests.training.planted import WordTokenizer, cut, firing_where, keys, noise, planted_documents, small_taxonomy
from tests.training.samples import contents
from tests.training.workshop import Trained, Workshop
from training import packing
from training.cluster.explaining import run_on_cluster
from training.cluster.spreading import spread_on_cluster
from training.explain.endpoint import ChatEndpoint
from training.explain.executable import explain_features
from training.explain.interface import Excerpt, FeatureEvidence
from training.explain.material import MATERIAL_FILE, Material, load_material, save_material
from training.explain.spending import CapReachedError
from training.pipeline import load_preset, train_bank
from training.simulation.fidelity import score_features
from training.simulation.llm import SegmentText
from training.simulation.llm_run import LlmRun, run
from training.simulation.prompts import Level
from training.spreading import Work, work_off
from training.stages import Stages

pytestmark = RAY
PARTS = 12
LEVELS: tuple[Level, ...] = ("token", "segment")


def nobody(work: Work[Any, Any], parts: Any) -> Iterator[Any]:
    """Finds nothing left to do."""
    assert list(parts) == []
    yield from ()


def test_explanations_and_scores_are_those_of_one_process_and_are_found_again(
    cluster: TwoNodes, tmp_path: Path
) -> None:
    tokenizer = WordTokenizer()
    text = cut(planted_documents(60), tokenizer)
    acts = np.concatenate([firing_where(text, lambda p: p == "harbour", lambda p: p == "lantern"), noise(text, 15)], 1)
    names = keys(acts.shape[1])
    said: list[tuple[str, int, int]] = []

    def describe(**who: Any) -> str:
        found = explain_features(
            acts, names, text, small_taxonomy(), tokenizer, seed=0, report=lambda *r: said.append(r[:3]), **who
        )
        predicates = [f.explanation.predicate for f in found if f.explanation.predicate is not None]
        return repr((found, score_features(acts, names, predicates, text, small_taxonomy(), seed=0, **who)))

    alone = describe()
    assert said[-1] == ("explain", 17, 17)
    said.clear()
    assert describe(spread=spread_on_cluster, kept=tmp_path) == alone
    assert said[-1] == ("explain", 17, 17)
    assert len(said) == 2
    assert describe(spread=nobody, kept=tmp_path) == alone


def test_a_bank_that_is_described_on_a_cluster_has_the_bytes_of_one_that_is_not(
    cluster: TwoNodes, workshop: Workshop, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained.work, work)
    (work / MATERIAL_FILE).unlink()
    handed: list[str] = []

    def spread(work: Work[Any, Any], parts: Any) -> Iterator[Any]:
        handed.append(type(work).__name__)
        return spread_on_cluster(work, parts)

    def train() -> Bank:
        return train_bank(
            model=workshop.model,
            tokenizer=workshop.tokenizer,
            identity=identify(workshop.model, workshop.tokenizer, "tiny"),
            preset=load_preset(str(workshop.write_preset())),
            data=workshop.data,
            out=tmp_path / "bank",
            work=work,
            report=lambda *_: None,
            stages=Stages(spread=spread),
        )

    def refuse(*_: Any, **__: Any) -> Bank:
        raise DataError("no room for a bank")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "save_bank", refuse)
        with pytest.raises(DataError, match="no room"):
            train()
    assert handed == ["Ablating", "Explaining", "Scoring"]
    monkeypatch.setattr("training.cluster.spreading.spread_over", nobody_over)  # it is kept until the bank is there
    train()
    assert contents(tmp_path / "bank") == contents(trained.out)
    assert load_material(work / MATERIAL_FILE) == load_material(trained.work / MATERIAL_FILE)
    assert not (work / packing.DESCRIBED_FOLDER).exists()


def nobody_over(places: Any, work: Work[Any, Any], parts: Any) -> Iterator[Any]:
    return nobody(work, parts)


def test_a_node_that_is_killed_costs_what_it_had_in_hand(cluster: TwoNodes, tmp_path: Path) -> None:
    finished: list[int] = []

    def on_part(number: int) -> None:
        finished.append(number)
        if len(finished) == 4:
            cluster.kill_second()

    work = Slowly(folder=tmp_path)
    assert work_off(work, PARTS, int, spread=spread_on_cluster, on_part=on_part) == [[n, n * n] for n in range(PARTS)]
    assert cluster.second is None
    assert sorted(finished) == list(range(PARTS))
    assert PARTS <= len(work.done()) <= PARTS + 2


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_stopped_goes_on_with_what_is_finished(
    cluster: TwoNodes, tmp_path: Path, end: signal.Signals
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    stop_driver(__name__, tmp_path, cluster.address, once=lambda: len(list(kept.glob("*.json"))) >= 3, end=end)
    finished = contents(kept)
    assert 3 <= len(finished) < PARTS
    work = Slowly(folder=tmp_path)
    handed: list[int] = []

    def spread(work: Work[Any, Any], parts: Any) -> Iterator[Any]:
        for number, part in parts:
            handed.append(number)
            yield number, work.do(part)

    assert work_off(work, PARTS, int, spread=spread, kept=kept) == [[n, n * n] for n in range(PARTS)]
    assert len(handed) == PARTS - len(finished)
    assert {name: contents(kept)[name] for name in finished} == finished


def test_what_no_other_worker_would_avoid_is_said_at_once(cluster: TwoNodes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="part 3 cannot be done"):
        work_off(Slowly(folder=tmp_path, bad=3), 60, int, spread=spread_on_cluster)
    assert len(Slowly(folder=tmp_path).done()) < 30


def test_what_ends_every_worker_is_not_tried_for_ever(
    cluster: TwoNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.cluster.pool.STILL_SECONDS", 12.0)
    with pytest.raises(DataError, match=r"has finished nothing for .* memory; what is finished is kept"):
        work_off(Slowly(folder=tmp_path, deadly=1), 3, int, spread=spread_on_cluster)


def features(n: int) -> list[Material]:
    found = []
    for number in range(n):
        shown = Excerpt(tokens=("The", " ship", f" {number}"), activations=(0.0, 0.9, 0.0))
        segments = tuple(
            SegmentText(tokens=("A", word, f" {number}"), activations=(0.0, fires, 0.0), text=f"A{word} {number}")
            for word, fires in ((" ship", 0.8), (" cart", 0.0), (" boat", 0.3))
        )
        evidence = FeatureEvidence(id=f"L1/{number}", positives=(shown,), negatives=())
        found.append(Material(evidence=evidence, segments=segments))
    return found


def answer(body: Mapping[str, Any]) -> str:
    """The same to the same question; one in three explanations cannot be read at first."""
    asked = body["messages"][-1]["content"]
    if asked.startswith("Active:"):
        number = int(asked.split('"', 2)[1].split()[-1])
        readable = number % 3 or "Answer" in asked.splitlines()[-1] or len(asked.splitlines()) > 3
        return json.dumps({"explanation": f"ship number {number}"}) if readable else "Ships, I think."
    return json.dumps({str(row + 1): [0, 9 - row, 0] if "Excerpt" in asked else int(row == 0) for row in range(3)})


def ask(who: Any, server: ScriptedServer, cache: Path, n: int = 8, **options: Any) -> tuple[LlmRun, ChatEndpoint]:
    material = features(n)
    with ChatEndpoint(server.url, "model", cache=cache, backoff=0.001, **options) as endpoint:
        found = who(
            [m.evidence for m in material],
            {m.evidence.id: m.segments for m in material},
            endpoint=endpoint,
            levels=LEVELS,
        )
    return found, endpoint


def test_one_cap_holds_for_all_workers_and_no_question_is_put_twice(cluster: TwoNodes, tmp_path: Path) -> None:
    with ScriptedServer(usual=say(answer)) as server:
        alone, _ = ask(run, server, tmp_path / "alone")
        calls = len(server.bodies)
    together = Together(3)
    with ScriptedServer(usual=together.behave) as server:
        found, endpoint = ask(run_on_cluster, server, tmp_path / "cluster", workers=3, max_calls=calls)
        assert endpoint.usage.calls == len(server.bodies) == calls
        again, _ = ask(run, server, tmp_path / "cluster", max_calls=0)  # what was paid for there is paid for here
        assert len(server.bodies) == calls
    assert together.most == 3
    assert found.stopped is again.stopped is None
    assert found.rows == again.rows == alone.rows
    assert found.summary == alone.summary
    assert {row["id"] for row in found.rows if row["explanation"] is not None} == {f"L1/{i}" for i in range(8)}


def test_a_budget_is_not_overspent_and_the_next_run_goes_on(cluster: TwoNodes, tmp_path: Path) -> None:
    with ScriptedServer(usual=say(answer)) as server:
        alone, endpoint = ask(run, server, tmp_path / "alone")
        calls = endpoint.usage.calls
    with ScriptedServer(usual=say(answer)) as server:
        found, _ = ask(run_on_cluster, server, tmp_path / "cluster", workers=4, max_calls=5)
        assert isinstance(found.stopped, CapReachedError)
        assert "run the same command again" in str(found.stopped)
        assert len(server.bodies) == 5
        assert len(found.rows) < 8
        found, _ = ask(run_on_cluster, server, tmp_path / "cluster", workers=4, max_calls=calls - 5)
        assert len(server.bodies) == calls
    assert found.stopped is None
    assert found.rows == alone.rows


def test_a_node_that_is_killed_takes_no_call_with_it(cluster: TwoNodes, tmp_path: Path) -> None:
    with ScriptedServer(usual=say(answer)) as server:
        alone, endpoint = ask(run, server, tmp_path / "alone", n=12)
        calls = endpoint.usage.calls
    lock = threading.Lock()

    def behave(handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
        with lock:
            if len(server.bodies) >= 6:
                cluster.kill_second()
        say(answer)(handler, body)

    with ScriptedServer(usual=behave) as server:
        found, _ = ask(run_on_cluster, server, tmp_path / "cluster", n=12, workers=3, max_calls=calls)
        assert len(server.bodies) == calls  # not even those that were on their way for it
    assert cluster.second is None
    assert found.stopped is None
    assert found.rows == alone.rows


def test_the_command_writes_the_same_file_and_says_at_once_what_all_would_meet(
    cluster: TwoNodes, trained: Trained, tmp_path: Path
) -> None:
    ids = list(trained.bank.by_id)[:2]
    material = [replace(m, evidence=replace(m.evidence, id=id_)) for m, id_ in zip(features(2), ids, strict=True)]
    save_material(tmp_path / "work" / MATERIAL_FILE, material)

    def explain(url: str, out: str, *more: object) -> Any:
        folders = ["--bank", trained.out, "--work", tmp_path / "work", "--out", tmp_path / out, "--features", 2]
        arguments = ["train", "explain", *folders, "--endpoint", url, "--model", "m", "--simulate", "both", *more]
        return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])

    with ScriptedServer(usual=say(answer)) as server:
        assert explain(server.url, "cluster.jsonl", "--cluster", cluster.address).exit_code == 0
        shutil.rmtree(tmp_path / "work" / "endpoint-replies")
        assert explain(server.url, "here.jsonl").exit_code == 0
    assert (tmp_path / "cluster.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "work" / "endpoint-replies")
    with ScriptedServer(usual=fail(401, "who are you?")) as server:
        result = explain(server.url, "cluster.jsonl", "--cluster", cluster.address, "--workers", 2)
        assert len(server.bodies) == 1
    assert result.exit_code == 2
    assert "check the API key" in result.output
    assert (tmp_path / "cluster.jsonl").read_text() == ""


class Together:
    """Answers when so many calls are under way at once, after the first, and remembers the most that ever were."""

    def __init__(self, calls: int) -> None:
        self.most = 0
        self._calls = calls
        self._under_way = 0
        self._seen = 0
        self._reached = threading.Event()
        self._lock = threading.Lock()

    def behave(self, handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
        with self._lock:
            self._seen += 1
            first = self._seen == 1
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            if self._under_way == self._calls:
                self._reached.set()
        if not first:
            self._reached.wait(PATIENCE)
        with self._lock:
            self._under_way -= 1
        say(answer)(handler, body)


def main(folder: Path, address: str) -> None:
    """Work slowly until something ends this."""
    from feature_bank.ray_cluster import connect

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with connect(address):
            work_off(Slowly(folder=folder), PARTS, int, spread=spread_on_cluster, kept=folder / "kept")
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
