"""Reviews are never lost, never mixed up, and the last word on a feature is the effective one."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from feature_bank import review as reviews_module
from feature_bank.bank import REVIEWS, Bank
from feature_bank.errors import BankError
from feature_bank.review import (
    Draft,
    EffectiveLabel,
    append_reviews,
    carry_reviews,
    effective,
    load_labels,
    load_reviews,
    pending,
    rejected_ids,
)
from feature_bank.verdicts import parse_record
from tests.factories import make_bank
from tests.feature_bank.variants import write_variant

FIRST, SECOND = "L1/3", "L1/10"  # the tiny bank's first two features: pornography and politics


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    return tmp_path / "bank"


def draft(feature: str = FIRST, verdict: str = "accept", **fields: Any) -> Draft:
    reason = "because" if verdict in ("reject", "note") else ""
    data = {"feature": feature, "verdict": verdict, "reviewer": "ann", "reason": reason, **fields}
    return parse_record(Draft, data, "draft")


def label(folder: Path, feature: str = FIRST) -> EffectiveLabel:
    return load_labels(folder, Bank.load(folder))[1][feature]


def test_reviews_are_read_back_as_they_were_given(folder: Path) -> None:
    bank = Bank.load(folder)
    drafts = [
        draft(reason="选举 — clear"),
        draft(verdict="relabel", overrides={"domains": ["violence", "terror"], "explanation": "a riot"}),
        draft(SECOND, "note", reviewer="Bo Li"),
    ]
    given = [*append_reviews(folder, drafts[:1]), *append_reviews(folder, drafts[1:])]
    assert load_reviews(folder).reviews == tuple(given)
    for review, expected in zip(given, drafts, strict=True):
        assert parse_record(Draft, {name: getattr(review, name) for name in Draft.model_fields}, "x") == expected
        assert (review.bank, review.content_hash) == (bank.version, bank.content_hash)
        assert review.sae_sha256 == bank.manifest.hook_points[0].sae_sha256
    assert Bank.load(folder).content_hash == bank.content_hash


def test_the_last_verdict_wins_field_by_field(folder: Path) -> None:
    machine = label(folder)
    assert (machine.status, machine.reviewer, machine.time) == ("unreviewed", None, None)
    append_reviews(folder, [draft(verdict="note")])
    assert label(folder) == machine  # a note changes nothing
    append_reviews(folder, [draft(verdict="relabel", overrides={"domains": ["terror"]})])
    append_reviews(folder, [draft(verdict="relabel", overrides={"explanation": "new"}, reviewer="bo")])
    found = label(folder)
    assert (found.domains, found.concepts, found.explanation) == (("terror",), machine.concepts, "new")
    assert (found.status, found.reviewer) == ("accepted", "bo")
    append_reviews(folder, [draft(verdict="reject"), draft(SECOND)])
    assert (label(folder).status, label(folder).explanation) == ("rejected", "new")
    assert (label(folder, SECOND).status, label(folder, "L3/3").status) == ("accepted", "unreviewed")
    append_reviews(folder, [draft()])
    assert label(folder).status == "accepted"
    append_reviews(folder, [draft(verdict="relabel", overrides={"domains": [], "concepts": []})])
    assert label(folder).domains == ()


def test_an_unknown_feature_or_concept_is_refused_and_nothing_written(folder: Path) -> None:
    with pytest.raises(BankError, match=r"no feature 'L9/9'.*bank list"):
        append_reviews(folder, [draft(), draft("L9/9")])
    with pytest.raises(BankError, match=r"concept 'elections_and_weather'.*taxonomy list"):
        append_reviews(folder, [draft(verdict="relabel", overrides={"concepts": ["elections_and_weather"]})])
    assert load_reviews(folder).reviews == ()
    concept = next(iter(reviews_module.load_taxonomy()["politics"].concepts)).id
    for name in (concept, f"politics/{concept}"):
        append_reviews(folder, [draft(verdict="relabel", overrides={"concepts": [name]})])
        assert label(folder).concepts == (name,)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"feature": "14/3"}, "feature", "pattern"),
        ({"verdict": "maybe"}, "verdict", "accept"),
        ({"reviewer": " \t "}, "reviewer", "at least 1"),
        ({"reviewer": "x" * 101}, "reviewer", "100"),
        ({"reason": "x" * 2001}, "reason", "2000"),
        ({"reason": "a\x1b[2Jb"}, "reason", "U+001B"),
        ({"reason": "a\u202eb"}, "reason", "U+202E"),
        ({"reason": "a\x00b"}, "reason", "U+0000"),
        ({"reason": "a\ud800b"}, "reason", ""),
        ({"reason": 3}, "reason", "string"),
        ({"verdict": "reject", "reason": "  "}, None, "needs a reason"),
        ({"verdict": "note", "reason": ""}, None, "needs a reason"),
        ({"verdict": "relabel"}, None, "relabel needs"),
        ({"verdict": "relabel", "overrides": {}}, None, "relabel needs"),
        ({"verdict": "relabel", "overrides": {"domains": ["weather"]}}, "overrides.domains.0", "politics"),
        ({"verdict": "relabel", "overrides": {"explanation": ""}}, "overrides.explanation", "at least 1"),
        ({"verdict": "relabel", "overrides": {"surprise": 1}}, "overrides.surprise", "not permitted"),
        ({"overrides": {"domains": []}}, None, "only a relabel"),
        ({"surprise": 1}, "surprise", "not permitted"),
    ],
)
def test_a_review_that_breaks_the_rules_names_its_field(
    changes: dict[str, Any], field: str | None, message: str
) -> None:
    data = {"feature": FIRST, "verdict": "accept", "reviewer": "ann", **changes}
    with pytest.raises(BankError) as error:
        parse_record(Draft, data, "f.jsonl:7")
    assert (error.value.file, error.value.field) == ("f.jsonl:7", field)
    assert message in str(error.value)


def test_white_space_becomes_one_line(folder: Path) -> None:
    (given,) = append_reviews(folder, [draft(reason=" two\n lines\u2028and\tmore ")])
    assert given.reason == "two lines and more"
    assert (folder / REVIEWS).read_bytes().count(b"\n") == 1


def test_a_malformed_line_is_refused_by_line_and_field(folder: Path) -> None:
    append_reviews(folder, [draft(), draft(), draft()])
    lines = (folder / REVIEWS).read_text().splitlines()
    record = json.loads(lines[1])
    for changes, field in (
        ({"verdict": "maybe"}, "verdict"),
        ({"time": "yesterday"}, "time"),
        ({"time": "2025-1-1T00:00:00.0Z"}, "time"),
        ({"sae_sha256": "abc"}, "sae_sha256"),
    ):
        content = "\n".join([lines[0], json.dumps(record | changes), lines[2]]) + "\n"
        (folder / REVIEWS).write_text(content)
        for action in (lambda: load_reviews(folder), lambda: append_reviews(folder, [draft()])):
            with pytest.raises(BankError) as error:
                action()
            assert (error.value.file, error.value.field) == (f"{REVIEWS}:2", field)
        assert (folder / REVIEWS).read_text() == content


def test_a_torn_end_is_reported_and_kept(folder: Path) -> None:
    append_reviews(folder, [draft(), draft(SECOND)])
    whole = (folder / REVIEWS).read_bytes()
    (folder / REVIEWS).write_bytes(whole[:-30])
    assert [review.feature for review in load_reviews(folder).reviews] == [FIRST]
    assert load_reviews(folder).torn == (2,)
    append_reviews(folder, [draft(SECOND, "reject")])
    log = load_reviews(folder)
    assert ([review.verdict for review in log.reviews], log.torn) == (["accept", "reject"], (2,))
    assert (folder / REVIEWS).read_bytes().startswith(whole[:-30])


def test_a_review_at_this_version_of_a_feature_it_lacks_is_refused(folder: Path) -> None:
    append_reviews(folder, [draft()])
    text = (folder / REVIEWS).read_text()
    (folder / REVIEWS).write_text(text.replace(FIRST, "L9/9"))
    with pytest.raises(BankError, match="L9/9") as error:
        label(folder)
    assert error.value.file == REVIEWS


def test_two_writers_at_once_lose_nothing(folder: Path) -> None:
    bank = Bank.load(folder)

    def write(name: str) -> None:
        for index in range(20):
            append_reviews(folder, [draft(reason=str(index), reviewer=name)] * 2, bank=bank)

    writers = [threading.Thread(target=write, args=(name,)) for name in ("ann", "bo")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    found = load_reviews(folder).reviews
    assert len(found) == 80
    times = [review.time for review in found]
    assert times == sorted(set(times))
    for name in ("ann", "bo"):
        assert [int(r.reason) for r in found if r.reviewer == name] == [i for i in range(20) for _ in range(2)]


def test_a_clock_that_was_set_back_does_not_change_the_order(folder: Path) -> None:
    append_reviews(folder, [draft()])
    record = json.loads((folder / REVIEWS).read_text())
    (folder / REVIEWS).write_text(json.dumps(record | {"time": "2999" + record["time"][4:]}) + "\n")
    append_reviews(folder, [draft(verdict="reject")])
    assert label(folder).status == "rejected"


# ---- versions ------------------------------------------------------------------------------------


def test_reviews_are_carried_into_a_version_with_the_same_sae(folder: Path, tmp_path: Path) -> None:
    first = Bank.load(folder)
    append_reviews(folder, [draft(verdict="reject"), draft(SECOND)])
    new = write_variant(first, tmp_path / "new", version="2")
    append_reviews(tmp_path / "new", [draft(SECOND, "reject")])
    assert carry_reviews(folder, tmp_path / "new") == 2
    assert carry_reviews(folder, tmp_path / "new") == 0
    found = load_reviews(tmp_path / "new").reviews
    assert [review.bank for review in found] == [first.version, first.version, new.version]
    assert label(tmp_path / "new").status == "rejected"
    assert label(tmp_path / "new", SECOND).status == "rejected"  # carried later, given earlier


def test_a_review_does_not_count_for_a_feature_of_another_sae(folder: Path, tmp_path: Path) -> None:
    bank = Bank.load(folder)
    hooks = [hook.model_dump() for hook in bank.manifest.hook_points]
    hooks[0]["sae_sha256"] = "0" * 64
    write_variant(bank, tmp_path / "new", hook_points=hooks)
    append_reviews(folder, [draft(verdict="reject"), draft("L3/3", "reject")])
    carry_reviews(folder, tmp_path / "new")
    assert len(load_reviews(tmp_path / "new").reviews) == 2
    assert label(tmp_path / "new").status == "unreviewed"
    assert rejected_ids(tmp_path / "new") == {"L3/3"}


def test_a_rejection_of_a_feature_that_a_version_left_out_is_remembered(folder: Path, tmp_path: Path) -> None:
    append_reviews(folder, [draft(verdict="reject"), draft(SECOND, "reject"), draft(SECOND, "note")])
    text = (folder / REVIEWS).read_text().replace(Bank.load(folder).content_hash, "0" * 64)
    (folder / REVIEWS).write_text(text.replace(FIRST, "L1/4"))  # as if given at a version that had it
    assert rejected_ids(folder) == {"L1/4", SECOND}
    assert label(folder).status == "unreviewed"


def test_pending_tells_what_a_refit_would_change(folder: Path, tmp_path: Path) -> None:
    bank = Bank.load(folder)
    append_reviews(folder, [draft(verdict="reject"), draft(SECOND, "relabel", overrides={"explanation": "new"})])
    _, labels = load_labels(folder, bank)
    found = pending(bank, labels)
    assert (found.rejected, found.relabelled, len(found)) == ((FIRST,), (SECOND,), 2)
    refitted = write_variant(
        bank,
        tmp_path / "new",
        features=lambda f: {"explanation": labels[f.id].explanation},
        heads=lambda _, head: {
            "features": head.features[-1:],
            "weights": head.weights[-1:],
            "steering": head.steering[-1:],
        },
    )
    carry_reviews(folder, tmp_path / "new")
    assert len(pending(refitted, effective(refitted, load_reviews(tmp_path / "new").reviews))) == 0


def test_a_bank_that_is_replaced_keeps_its_reviews(folder: Path) -> None:
    bank = Bank.load(folder)
    append_reviews(folder, [draft(verdict="reject")])
    write_variant(bank, folder, version="2")
    assert Bank.load(folder).manifest.version == "2"
    assert rejected_ids(folder) == {FIRST}


def test_a_bank_without_a_file_of_reviews_has_none(folder: Path, tmp_path: Path) -> None:
    (folder / REVIEWS).unlink()
    assert load_reviews(folder).reviews == ()
    append_reviews(folder, [draft()])
    assert len(load_reviews(folder).reviews) == 1
    shutil.copytree(folder, tmp_path / "copy")
    assert load_reviews(tmp_path / "copy") == load_reviews(folder)
