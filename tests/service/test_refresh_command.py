"""`train refresh` as a command: what it says, what it writes, and that it never promotes what is worse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from feature_bank.bank import Bank, bank_folder
from feature_bank.errors import BankError
from feature_bank.versions import VersionStore
from guard.models import LoadedModel
from service.cli import build_app
from tests.factories import make_bank
from tests.training.marked_texts import ranked, spool_of, write_texts
from training.corpus import read_documents
from training.refresh_texts import Texts, encode_texts

Run = Callable[..., Result]


@pytest.fixture
def store(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> VersionStore:
    make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires={"politics": None})
    found = VersionStore(tmp_path / "store")
    found.promote(tmp_path / "bank")
    return found


@pytest.fixture
def live(tmp_path: Path, store: VersionStore, tiny_model: Any, tiny_tokenizer: Any) -> Texts:
    """Texts that the server has judged, as the bank's features see them."""
    documents, _ = read_documents([write_texts(tmp_path / "live.jsonl", 6, odd=True)])
    return encode_texts(
        documents,
        bank=Bank.load(tmp_path / "bank"),
        model=tiny_model,
        tokenizer=tiny_tokenizer,
        folder=tmp_path / "encoded",
        report=lambda *_: None,
    )


@pytest.fixture
def run(
    tmp_path: Path, store: VersionStore, monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tiny_tokenizer: Any
) -> Run:
    loaded = LoadedModel(tiny_model, tiny_tokenizer, "tiny")
    monkeypatch.setattr("guard.models.load_model", lambda *args, **options: loaded)
    monkeypatch.setattr("training.refresh.own_corpora", lambda: [write_texts(tmp_path / "own.jsonl", 5)])

    def invoke(*options: object) -> Result:
        arguments = [
            "train",
            "refresh",
            store.folder,
            "--spool",
            tmp_path / "spool.db",
            "--out",
            tmp_path / "next",
            *options,
        ]
        return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])

    return invoke


def mark(tmp_path: Path, live: Texts, count: int) -> list[int]:
    """Mark the texts that look most like politics as false positives."""
    bank = Bank.load(tmp_path / "bank")
    order = ranked(bank, live)
    spool_of(tmp_path / "spool.db", bank, live, order[:count], "false_positive")
    return order


def test_a_candidate_that_mends_and_costs_nothing_is_promoted_when_asked(
    run: Run, store: VersionStore, live: Texts, tmp_path: Path
) -> None:
    mark(tmp_path, live, 8)
    first = store.current
    result = run("--margin", 1)
    assert result.exit_code == 0, result.output
    assert "sailguard bank promote" in result.stdout
    assert "politics, marked false positives, fit: right" in result.stdout
    assert store.current == first
    more = write_texts(tmp_path / "more.jsonl", 8, source="elsewhere")
    result = run("--margin", 1, "--store", store.folder, "--promote", "--data", more)
    assert result.exit_code == 0, result.output
    assert store.current != first
    promoted, candidate = Bank.load(bank_folder(store.folder)), Bank.load(tmp_path / "next" / "bank")
    assert promoted.content_hash == candidate.content_hash
    assert "politics" in (tmp_path / "next" / "difference.txt").read_text()


def test_a_worse_candidate_is_kept_named_and_not_promoted(
    run: Run, store: VersionStore, live: Texts, tmp_path: Path
) -> None:
    order = mark(tmp_path, live, 40)
    first = store.current
    texts = read_documents([tmp_path / "live.jsonl"])[0]
    rows = [{"text": texts[row].text + " ", "known": ["politics"], "domains": ["politics"]} for row in order[:20]]
    rows += [{"text": texts[row].text + " ", "known": ["politics"]} for row in order[-20:]]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("--dev", tmp_path / "dev.jsonl", "--store", store.folder, "--promote")
    assert result.exit_code == 1, result.output
    assert "not promoted" in result.stderr
    assert "falls by" in result.stderr
    assert store.current == first
    assert Bank.load(tmp_path / "next" / "bank").manifest.parent
    assert json.loads((tmp_path / "next" / "refresh.json").read_text())["accepted"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--promote",), "--store"),
        (("--promote", "--store", "store"), "--dev"),
        (("--cluster", "auto"), "--retrain"),
        (("--dev", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--store", "store"), "no versions of a bank"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_read(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("guard.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    result = run(*options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_version_that_the_candidate_was_not_compared_with_is_not_replaced(
    run: Run, store: VersionStore, live: Texts, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    mark(tmp_path, live, 8)
    options = ("--margin", 1, "--data", write_texts(tmp_path / "more.jsonl", 8, source="elsewhere"))
    assert run(*options).exit_code == 0
    make_bank(tmp_path / "other", tiny_model, tiny_tokenizer, fires={"politics": None}, seed=9)
    served = VersionStore(tmp_path / "served")
    served.promote(tmp_path / "other")
    first = served.current
    result = run(*options, "--store", served.folder, "--promote")
    assert result.exit_code == 2
    assert f"{first} is current there" in result.stderr
    with pytest.raises(BankError, match=f"{re.escape(str(first))} is the current version"):
        served.promote(tmp_path / "next" / "bank", replaces=store.current)
    assert served.current == first


def test_texts_that_tell_nothing_of_the_versions_promote_nothing(
    run: Run, store: VersionStore, live: Texts, tmp_path: Path
) -> None:
    mark(tmp_path, live, 8)
    (tmp_path / "plain.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(40)))
    first = store.current
    for option, message in (("--dev", "no row has labels"), ("--data", "on more than the project's own texts")):
        result = run("--margin", 1, "--store", store.folder, "--promote", option, tmp_path / "plain.jsonl")
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())
    assert store.current == first


def test_a_rate_that_the_bank_has_no_threshold_for_is_refused_with_those_that_it_has(run: Run, live: Texts) -> None:
    result = run("--rate", "0.02")
    assert result.exit_code == 2
    assert "'0.02'" in result.stderr
    assert "0.01, 0.05" in result.stderr


def test_retraining_without_kept_texts_is_refused(run: Run, live: Texts, tmp_path: Path) -> None:
    mark(tmp_path, live, 4)
    result = run("--retrain", "--data", tmp_path / "live.jsonl")
    assert result.exit_code == 2
    assert "--spool-text" in " ".join(result.stderr.split())
