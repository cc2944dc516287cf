"""`bank review`: what was given stands in the log, and what is wrong changes nothing."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from feature_bank.bank import REVIEWS, Bank, shipped_bank_path
from feature_bank.review import load_reviews, rejected_ids
from service.commands.review_walk import Walk
from tests.service.commands import assert_one_line_error, run

ROOT = Path(__file__).resolve().parents[2]


def verdicts(bank: Path) -> list[tuple[str, str, str]]:
    return [(review.feature, review.verdict, review.reviewer) for review in load_reviews(bank).reviews]


def review(bank: Path, *args: object, feature: str = "L1/1", reviewer: str = "ann") -> Any:
    return run("bank", "review", bank, "--feature", feature, "--reviewer", reviewer, *args)


# ---- scripted ------------------------------------------------------------------------------------


def test_verdicts_are_written_and_shown(bank: Path) -> None:
    result = review(bank, "--reject", "--reason", "fires on everything")
    assert result.exit_code == 0, result.stderr
    assert "L1/1" in result.stdout
    assert "reject by ann; fires on everything" in result.stdout
    assert rejected_ids(bank) == {"L1/1"}
    again = review(bank, "--accept", "--json", feature="L1/0", reviewer="bo")
    (written,) = json.loads(again.stdout)
    assert (written["feature"], written["verdict"], written["bank"]) == ("L1/0", "accept", Bank.load(bank).version)
    assert verdicts(bank) == [("L1/1", "reject", "ann"), ("L1/0", "accept", "bo")]
    assert json.loads(run("bank", "review", bank, "--json").stdout)[1] == written
    listed = run("bank", "review", bank, "--list", "--feature", "L1/0")
    assert "accept by bo" in listed.stdout
    assert "reject" not in listed.stdout
    assert "1 of 2 reviews" in listed.stdout


def test_a_relabel_changes_what_is_listed_and_shown(bank: Path) -> None:
    result = review(
        bank, "--relabel", "--domain", "violence", "--domain", "terror", "--explanation", "on [b]every[/b] token"
    )
    assert result.exit_code == 0, result.stderr
    listed = json.loads(run("bank", "list", bank, "--domain", "terror", "--json").stdout)
    assert [(f["id"], f["domains"], f["effective"]["domains"]) for f in listed] == [
        ("L1/1", ["violence"], ["violence", "terror"])
    ]
    shown = run("bank", "show", "L1/1", bank).stdout
    for part in ("on [b]every[/b] token", "always on", "accepted by ann", "relabel by ann"):
        assert part in shown
    card = json.loads(run("bank", "show", "L1/1", bank, "--json").stdout)
    assert card["reviews"][0]["overrides"]["domains"] == ["violence", "terror"]
    assert review(bank, "--relabel", "--domain", "none").exit_code == 0
    assert json.loads(run("bank", "list", bank, "--domain", "violence", "--json").stdout) == []


def test_info_counts_what_waits_for_a_refit(bank: Path) -> None:
    assert "none" in run("bank", "info", bank).stdout
    review(bank, "--reject", "--reason", "x")
    review(bank, "--relabel", "--explanation", "y", feature="L1/0")
    info = run("bank", "info", bank).stdout
    assert "2; 1 features accepted, 1 rejected" in info
    assert "1 rejected features still in a head, 1 new labels; `sailguard train refit`" in info
    assert json.loads(run("bank", "info", bank, "--json").stdout)["reviews"] == {
        "given": 2,
        "accepted": 1,
        "rejected": 1,
        "pending_rejected": 1,
        "pending_relabelled": 1,
    }


def test_what_is_wrong_is_one_line_and_writes_nothing(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for args, parts in (
        (("--accept", "--reject"), ("one of them",)),
        (("--reject",), ("'reject' needs a reason",)),
        (("--relabel",), ("relabel needs",)),
        (("--relabel", "--domain", "weather"), ("overrides.domains.0",)),
        (("--relabel", "--concept", "weather"), ("weather", "taxonomy list")),
        (("--accept", "--explanation", "x"), ("only a relabel",)),
        (("--reject", "--reason", "a\x1b[2Jb"), ("reason", "U+001B")),
        (("--reject", "--reason", "x" * 3000), ("reason", "2000")),
        ((), ("--accept",)),  # standard input is no terminal
    ):
        assert_one_line_error(review(bank, *args), *parts)
    assert_one_line_error(review(bank, "--accept", feature="L9/9"), "L9/9", "bank list")
    assert_one_line_error(review(bank, "--accept", reviewer=" "), "reviewer")
    assert_one_line_error(run("bank", "review", bank, "--accept", "--reviewer", "ann"), "--feature")
    monkeypatch.delenv("USER", raising=False)
    assert_one_line_error(run("bank", "review", bank, "--accept", "--feature", "L1/1"), "--reviewer")
    assert verdicts(bank) == []
    monkeypatch.setenv("USER", "login")
    assert run("bank", "review", bank, "--accept", "--feature", "L1/1", "--feature", "L1/0").exit_code == 0
    assert verdicts(bank) == [("L1/1", "accept", "login"), ("L1/0", "accept", "login")]


def test_a_file_is_written_as_a_whole_or_not_at_all(bank: Path, tmp_path: Path) -> None:
    good = {"feature": "L1/1", "verdict": "reject", "reason": "x", "reviewer": "bo"}
    other = {"feature": "L1/0", "verdict": "relabel", "overrides": {"domains": ["terror"]}}
    file = tmp_path / "given.jsonl"
    for bad, parts in (
        ("{", ("line 2", "JSON")),
        (json.dumps(good | {"verdict": "maybe"}), ("given.jsonl:2", "verdict")),
        (json.dumps(good | {"feature": "L9/9"}), ("given.jsonl", "review 2", "L9/9")),
        ("3", ("given.jsonl:2",)),
    ):
        file.write_text(f"{json.dumps(good)}\n{bad}\n{json.dumps(other)}\n")
        assert_one_line_error(run("bank", "review", bank, "--from", file, "--reviewer", "ann"), *parts)
        assert verdicts(bank) == []
    file.write_text("\n")
    assert_one_line_error(run("bank", "review", bank, "--from", file), "no reviews")
    assert_one_line_error(run("bank", "review", bank, "--from", tmp_path / "gone"), "gone")
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(other)}")
    assert run("bank", "review", bank, "--from", file, "--reviewer", "ann").exit_code == 0
    assert verdicts(bank) == [("L1/1", "reject", "bo"), ("L1/0", "relabel", "ann")]


def test_the_bank_of_the_package_is_not_written_unasked() -> None:
    before = (shipped_bank_path() / REVIEWS).read_bytes()
    args = ("--feature", "L6/14", "--accept", "--reviewer", "ann")
    assert_one_line_error(run("bank", "review", *args), "bank promote")
    assert run("bank", "review", "--list").exit_code == 0
    assert (shipped_bank_path() / REVIEWS).read_bytes() == before


def test_a_torn_line_is_reported_and_a_malformed_one_refused(bank: Path) -> None:
    review(bank, "--accept")
    with (bank / REVIEWS).open("ab") as file:
        file.write(b'{"feature": "L1/')
    shown = run("bank", "info", bank)
    assert shown.exit_code == 0
    assert "line 2 was not written to its end" in shown.stderr
    assert review(bank, "--accept").exit_code == 0
    assert len(verdicts(bank)) == 2
    (bank / REVIEWS).write_text("what\n" + (bank / REVIEWS).read_text())
    for command in (("list", bank), ("review", bank, "--list"), ("show", "L1/1", bank)):
        assert_one_line_error(run("bank", *command), "reviews.jsonl:1")


# ---- the walk ------------------------------------------------------------------------------------


def walk(bank: Path, *answers: str, end: BaseException | None = None) -> tuple[Walk, str]:
    """A walk through both features with these answers; after the last one the input ends, or `end` is raised."""
    output = io.StringIO()
    given: Iterator[str] = iter(answers)

    def ask(question: str) -> str:
        output.write(question)
        answer = next(given, None)
        if answer is None:
            raise end or EOFError
        return answer

    loaded = Bank.load(bank)
    console = Console(file=output, width=200)
    taken = Walk(bank, loaded, reviewer="ann", console=console, ask=ask)
    taken.go(loaded.features)
    return taken, output.getvalue()


def test_a_walk_shows_each_feature_and_writes_each_verdict(bank: Path) -> None:
    taken, shown = walk(bank, "a", "right", "l", "violence, terror", "", "on all of it", "")
    assert taken.written == 2
    assert verdicts(bank) == [("L1/0", "accept", "ann"), ("L1/1", "relabel", "ann")]
    overrides = load_reviews(bank).reviews[1].overrides
    assert overrides is not None
    assert (overrides.domains, overrides.concepts) == (["violence", "terror"], None)
    for part in ("1 of 2", "never on", "2 of 2", "always on", "a bird"):
        assert part in shown


def test_a_note_asks_on_and_a_skipped_feature_has_no_verdict(bank: Path) -> None:
    walk(bank, "n", "look again", "?", "", "s", "R", "always fires")
    assert verdicts(bank) == [("L1/0", "note", "ann"), ("L1/1", "reject", "ann")]


@pytest.mark.parametrize("end", [None, KeyboardInterrupt()])
def test_what_was_written_stays_however_the_walk_ends(bank: Path, end: BaseException | None) -> None:
    if end is None:
        walk(bank, "a", "", end=end)
    else:
        with pytest.raises(KeyboardInterrupt):
            walk(bank, "a", "", "r", end=end)
    assert verdicts(bank) == [("L1/0", "accept", "ann")]
    walk(bank, "q")
    assert len(verdicts(bank)) == 1


def test_a_wrong_answer_is_told_and_asked_again(bank: Path) -> None:
    _, shown = walk(bank, "r", "", "l", "weather", "", "", "", "r", "because", "q")
    assert "needs a reason" in shown
    assert "overrides.domains.0" in shown
    assert verdicts(bank) == [("L1/0", "reject", "ann")]


def test_evidence_is_shown_with_its_peak_highlighted(bank: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system="standard", width=200)
    loaded = Bank.load(bank)
    Walk(bank, loaded, reviewer="ann", console=console, ask=lambda _: "q").go(loaded.features)
    assert "a \x1b[1;7mbird\x1b[0m" in output.getvalue()


def test_the_walk_runs_on_a_real_terminal(bank: Path) -> None:
    review(bank, "--accept", feature="L1/0")
    controller, terminal = pty.openpty()
    code = "from service.cli import main; main()"
    command = [sys.executable, "-c", code, "bank", "review", str(bank), "--reviewer", "ann", "--domain", "violence"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT)
    os.close(terminal)
    shown = b""
    try:
        for expected, answer in (("[q]uit: ", b"r\n"), ("why: ", b"always fires\n")):
            deadline = time.monotonic() + 60
            while expected.encode() not in shown and time.monotonic() < deadline:
                shown += os.read(controller, 4096)
            os.write(controller, answer)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    assert b"1 of 1" in shown  # the accepted feature is not asked for
    assert verdicts(bank)[1:] == [("L1/1", "reject", "ann")]
