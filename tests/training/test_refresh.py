"""A refresh of a tiny bank: what is written, refused, kept and taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_bank.bank import Bank
from feature_bank.errors import DataError
from feature_bank.review import append_reviews
from feature_bank.verdicts import Draft
from feature_bank.versions import VersionStore
from guard import Guard
from tests.factories import make_bank, make_policy
from tests.training.marked_texts import ranked, spool_of, write_texts
from training import refresh_texts
from training.corpus import read_documents
from training.refresh import refresh_bank
from training.refresh_heads import forms_of, score
from training.refresh_texts import Texts, encode_texts, rows_digest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "own.jsonl", 5)


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Other texts, which the server has judged."""
    return write_texts(tmp_path / "live.jsonl", 6, odd=True)


@pytest.fixture
def source(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires={"politics": None})
    return tmp_path / "bank"


@pytest.fixture
def encoded(tmp_path: Path, source: Path, live: Path, tiny_model: Any, tiny_tokenizer: Any) -> Texts:
    return encode_texts(
        read_documents([live])[0],
        bank=Bank.load(source),
        model=tiny_model,
        tokenizer=tiny_tokenizer,
        folder=tmp_path / "encoded",
        report=lambda *_: None,
    )


@pytest.fixture
def run(source: Path, corpus: Path, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Callable[..., Any]:
    def go(spool: Path, **options: Any) -> Any:
        given = {"out": tmp_path / "out", "own": [corpus], "report": lambda *_: None, "margin": 1.0, **options}
        return refresh_bank(source, spool=spool, model=tiny_model, tokenizer=tiny_tokenizer, **given)

    return go


def test_encoded_texts_are_what_the_guard_sees(
    source: Path, live: Path, encoded: Texts, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    documents, _ = read_documents([live])
    bank = Bank.load(source)
    position = {feature.id: place for place, feature in enumerate(bank.features)}
    form = forms_of(bank.heads["politics"], bank.pooling, position)[0]
    policy = make_policy({"domain": "politics", "scope": ["prompt", "response"], "action": "flag"})
    with Guard.from_bank(source, policy=policy).attach(tiny_model, tiny_tokenizer) as attached:
        found = attached.score([d.text for d in documents[:20]], ["passage"] * 20)
    expected = [result.scores["politics"] for result in found]
    np.testing.assert_allclose(form.probabilities(score(form, encoded))[:20], expected, atol=5e-3)


def test_marked_false_positives_are_mended_in_a_next_version_with_the_same_rows(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    rows = ranked(bank, encoded)[:8]
    found = run(spool_of(tmp_path / "spool.db", bank, encoded, rows, "false_positive"))
    marks = found.report["fresh"]["politics"]["marks"]["false_positives"]
    assert marks["fit"]["right_after"] == marks["fit"]["marked"] > 0
    assert not found.problems
    assert found.bank.manifest.parent == bank.version
    assert found.bank.manifest.version != bank.manifest.version
    assert rows_digest(found.bank) == rows_digest(bank)
    assert found.bank.features == bank.features
    assert found.bank.heads["violence"] == bank.heads["violence"]
    assert found.bank.heads["politics"].steering == bank.heads["politics"].steering
    assert json.loads((tmp_path / "out" / "refresh.json").read_text())["accepted"] is True
    VersionStore(tmp_path / "store").promote(source)
    assert VersionStore(tmp_path / "store").promote(found.folder).changed


def test_with_marks_that_say_what_the_guard_said_heads_are_the_same(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    found = run(spool_of(tmp_path / "spool.db", bank, encoded, ranked(bank, encoded)[-6:], "correct"))
    assert found.bank.heads == bank.heads
    assert not found.problems


def test_a_regression_is_refused_by_name_and_amount_and_the_candidate_is_kept(
    run: Callable[..., Any], source: Path, encoded: Texts, live: Path, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    best = ranked(bank, encoded)[:40]
    dev = tmp_path / "dev.jsonl"
    texts = read_documents([live])[0]
    lines = [{"text": texts[row].text + " ", "known": ["politics"], "domains": ["politics"]} for row in best[:20]]
    lines += [{"text": texts[row].text + " ", "known": ["politics"]} for row in ranked(bank, encoded)[-20:]]
    dev.write_text("".join(json.dumps({**line, "role": "passage"}) + "\n" for line in lines))
    spool = spool_of(tmp_path / "spool.db", bank, encoded, best, "false_positive")
    found = run(spool, dev=[dev], margin=0.01)
    assert any("politics" in problem and "falls by" in problem and "--dev" in problem for problem in found.problems)
    assert Bank.load(tmp_path / "out" / "bank").version == found.bank.version
    assert json.loads((tmp_path / "out" / "refresh.json").read_text())["accepted"] is False


def test_a_second_run_reads_no_text_again_and_comes_to_the_same(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank.load(source)
    spool = spool_of(tmp_path / "spool.db", bank, encoded, ranked(bank, encoded)[:8], "false_positive")
    first = run(spool)
    monkeypatch.setattr(refresh_texts, "_encode", lambda *_: pytest.fail("a text was read again"))
    assert run(spool).bank.heads == first.bank.heads


def test_a_torn_file_of_the_work_folder_is_made_anew(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    spool = spool_of(tmp_path / "spool.db", bank, encoded, ranked(bank, encoded)[:8], "false_positive")
    first = run(spool)
    for path in (tmp_path / "out" / "work").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert run(spool).bank.heads == first.bank.heads


def test_a_feature_that_a_review_rejects_weighs_nothing(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    gone = bank.heads["politics"].features[0]
    draft = Draft(feature=gone, verdict="reject", reviewer="an analyst", reason="a reason")
    append_reviews(source, [draft])
    found = run(spool_of(tmp_path / "spool.db", bank, encoded, [0], "correct", marked=False))
    head = found.bank.heads["politics"]
    assert dict(zip(head.features, head.weights, strict=True))[gone] == 0.0
    assert found.report["rejected"] == [gone]


def test_items_of_a_bank_with_other_features_do_not_count_and_nothing_to_learn_is_refused(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    other = make_bank(tmp_path / "other", tiny_model, tiny_tokenizer, fires={"politics": None}, seed=9)
    spool = spool_of(tmp_path / "spool.db", other, encoded, [0, 1], "false_positive")
    with pytest.raises(DataError, match=r"2 judged with a bank that is not known here .* --store"):
        run(spool)


def test_items_of_an_earlier_version_in_the_store_count(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    VersionStore(tmp_path / "store").promote(source)
    spool = spool_of(tmp_path / "spool.db", bank, encoded, ranked(bank, encoded)[:8], "false_positive")
    first = run(spool)
    moved = tmp_path / "moved"
    shutil.copytree(first.folder, moved)
    shutil.rmtree(source)
    shutil.copytree(moved, source)
    found = run(spool, store=tmp_path / "store", out=tmp_path / "again")
    assert found.report["spool"]["marked"] == 8
    assert found.bank.manifest.version == "3"


def test_marks_are_mended_at_the_rate_at_which_rules_stand_and_another_one_is_noticed(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    form = forms_of(bank.heads["politics"], bank.pooling, {f.id: i for i, f in enumerate(bank.features)})[0]
    reached = form.probabilities(score(form, encoded))
    strict, loose = form.thresholds["0.01"], form.thresholds["0.05"]
    between = np.flatnonzero((reached >= loose) & (reached < strict))[:8].tolist()
    assert between
    spool = spool_of(tmp_path / "spool.db", bank, encoded, between, "false_positive")
    assert run(spool).report["fresh"]["politics"]["served_otherwise"] == len(between)
    found = run(spool, rate="0.05", out=tmp_path / "loose")
    assert found.report["fresh"]["politics"]["served_otherwise"] == 0
    marks = found.report["fresh"]["politics"]["marks"]["false_positives"]["fit"]
    assert marks["right_after"] > marks["right_before"] == 0


def test_a_domain_that_no_text_tells_of_is_not_said_to_be_as_good_as_before(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    spool = spool_of(tmp_path / "spool.db", bank, encoded, ranked(bank, encoded)[:8], "false_positive")
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(60)))
    found = run(spool, own=[plain])
    assert any(problem.startswith("politics: no text that was not fitted on") for problem in found.problems)


def test_what_is_made_of_users_texts_is_for_this_user_alone(
    run: Callable[..., Any], source: Path, encoded: Texts, tmp_path: Path
) -> None:
    bank = Bank.load(source)
    run(spool_of(tmp_path / "spool.db", bank, encoded, ranked(bank, encoded)[:8], "false_positive"))
    assert (tmp_path / "out" / "work").stat().st_mode & 0o777 == 0o700
