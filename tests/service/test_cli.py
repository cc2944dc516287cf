"""The command line, run for real on the tiny model and a bank whose violence head is always sure."""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from feature_bank import DOMAINS, Bank
from service.commands import serve as serve_command
from service.commands.terminal import plain
from tests.service import commands
from tests.service.commands import Run, assert_one_line_error

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def run() -> Run:
    return commands.run


@pytest.fixture
def lenient(tmp_path: Path) -> Path:
    """A policy under which nothing fires."""
    path = tmp_path / "lenient.yaml"
    path.write_text("name: lenient\nrules:\n  - {domain: politics, threshold: {fpr: 0.01}, action: flag}\n")
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines()]


# ---- the program ---------------------------------------------------------------------------------


def test_the_program_starts_without_any_heavy_package() -> None:
    code = (
        "import sys, service.cli; service.cli.build_app(); "
        "heavy = ('torch', 'transformers', 'sklearn', 'fastapi', 'numpy', 'training'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "chat",
        "check",
        "trace",
        "score",
        "eval",
        "train",
        "serve",
        "bank info",
        "bank list",
        "bank show",
        "bank search",
        "bank review",
        "bank verify",
    ],
)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_the_version_is_printed(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout.split()[0]) == (0, "sailguard")


def test_ctrl_c_ends_with_130_and_a_short_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("service.commands.bank.read_labelled", interrupted)
    result = run("bank", "info")
    assert (result.exit_code, result.stderr) == (130, "sailguard: interrupted\n")


def test_a_mistake_of_the_user_is_one_line_on_stderr_and_exit_2(
    run: Run, tmp_path: Path, model: Path, bank: Path
) -> None:
    nothing = tmp_path / "nothing"
    bad_policy = tmp_path / "bad.yaml"
    bad_policy.write_text("rules: [{domain: weather, threshold: {fpr: 0.01}, action: flag}]")
    bad_rows = tmp_path / "bad.jsonl"
    bad_rows.write_text('{"text": "fine"}\n{"text": 3}\n')
    guard = ("--model", model, "--bank", bank)
    assert_one_line_error(run("bank", "info", nothing), "bank.json", "nothing")
    assert_one_line_error(run("check", "hello", "--bank", nothing), "bank.json")
    assert_one_line_error(run("check", "hello", "--bank", bank, "--model", nothing), "nothing")
    assert_one_line_error(run("check", "hello", *guard, "--policy", bad_policy), "bad.yaml", "rules.0.domain")
    assert_one_line_error(run("check", "hello", *guard, "--policy", nothing), "nothing")
    assert_one_line_error(run("score", "--data", bad_rows, "--out", tmp_path / "o", *guard), "bad.jsonl, line 2")
    assert_one_line_error(run("score", "--data", nothing, "--out", tmp_path / "o", *guard), "nothing")
    assert_one_line_error(run("eval", "--data", nothing, *guard), "nothing")
    assert_one_line_error(run("bank", "show", "L9/9", bank), "L9/9")
    assert_one_line_error(run("bank", "list", bank, "--domain", "weather"), "weather")
    assert not (tmp_path / "o").exists()


def test_text_cannot_drive_the_terminal() -> None:
    assert plain("a\x1b[2Jb\rc\x9bd\u202ee\ud800f\tg\nh") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffde\ufffdf\tg\nh"


# ---- check and trace -----------------------------------------------------------------------------


def test_the_exit_code_of_check_says_whether_a_rule_fired(run: Run, model: Path, bank: Path, lenient: Path) -> None:
    fired = run("check", "hello there", "--model", model, "--bank", bank)
    assert fired.exit_code == 1
    assert "violence" in fired.stdout
    assert "always on" in fired.stdout
    assert "block" in fired.stdout
    quiet = run("check", "hello there", "--model", model, "--bank", bank, "--policy", lenient)
    assert quiet.exit_code == 0
    assert "allow" in quiet.stdout


@pytest.mark.parametrize("role", ["prompt", "response", "passage"])
def test_check_prints_json_that_names_what_judged(run: Run, model: Path, bank: Path, role: str) -> None:
    result = run("check", "hello", "--role", role, "--json", "--model", model, "--bank", bank)
    found = json.loads(result.stdout)
    assert (found["role"], found["action"], found["flagged"]["violence"]) == (role, "block", True)
    assert set(found["scores"]) == set(DOMAINS)
    assert found["features"]["violence"][0]["id"] == "L1/1"
    assert found["bank"] == Bank.load(bank).version
    assert found["policy"].startswith("default+")


def test_standard_input_may_hold_any_bytes(run: Run, model: Path, bank: Path) -> None:
    result = run("check", "-", "--json", "--model", model, "--bank", bank, stdin=b"caf\xff\xfe \x00 ok")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["tokens"] > 0


def test_empty_text_is_allowed(run: Run, model: Path, bank: Path) -> None:
    result = run("check", "-", "--json", "--model", model, "--bank", bank, stdin=b"")
    assert (result.exit_code, json.loads(result.stdout)["tokens"]) == (0, 0)


def test_a_trace_holds_every_token_of_the_text(run: Run, model: Path, bank: Path) -> None:
    text = "to be, or not"
    result = run("trace", text, "--json", "--model", model, "--bank", bank)
    assert result.exit_code == 0
    tokens = json.loads(result.stdout)["tokens"]
    assert "".join(token["text"] for token in tokens) == text
    assert all(set(token["scores"]) == set(DOMAINS) and token["features"] for token in tokens)
    table = run("trace", text, "--model", model, "--bank", bank)
    assert table.exit_code == 0
    assert len(table.stdout.splitlines()) >= len(text)


# ---- score and eval ------------------------------------------------------------------------------

ROWS = [
    {"id": "a", "text": "first", "role": "prompt"},
    {"text": "second"},
    {"id": "c", "text": "", "role": "response"},
    {"id": "d", "text": "first", "role": "prompt"},
    {"id": "e", "text": "\ud800 broken"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_row_is_scored_once_and_in_order(
    run: Run, tmp_path: Path, model: Path, bank: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.commands.score.BATCH_ROWS", 2)
    data, out = write_rows(tmp_path / f"in{suffix}", ROWS), tmp_path / f"out{suffix}"
    result = run("score", "--data", data, "--out", out, "--model", model, "--bank", bank)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    lines = read_lines(out)
    assert [line["id"] for line in lines] == ["a", hashlib.sha256(b"second").hexdigest()[:16], "c", "d", "e"]
    assert [line["action"] for line in lines] == ["block", "block", "allow", "block", "block"]
    assert lines[0]["scores"] == lines[3]["scores"]
    assert all(set(line["scores"]) == set(DOMAINS) for line in lines)


def test_a_row_is_judged_in_its_role(
    run: Run, tmp_path: Path, model: Path, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    from guard.session import AttachedGuard

    judge = AttachedGuard.score

    def score(self: AttachedGuard, texts: Sequence[str], roles: Any = None) -> Any:
        seen.extend(roles)
        return judge(self, texts, roles)

    monkeypatch.setattr(AttachedGuard, "score", score)
    data = write_rows(tmp_path / "in.jsonl", ROWS)
    run("score", "--data", data, "--out", tmp_path / "out", "--model", model, "--bank", bank)
    assert seen == ["prompt", "passage", "response", "prompt", "passage"]


def test_an_interrupted_run_leaves_the_old_output_and_nothing_else(
    run: Run, tmp_path: Path, model: Path, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guard.session import AttachedGuard

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AttachedGuard, "score", interrupted)
    data, folder = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "results"
    folder.mkdir()
    (folder / "out.jsonl").write_text("old\n")
    result = run("score", "--data", data, "--out", folder / "out.jsonl", "--model", model, "--bank", bank)
    assert result.exit_code == 130
    assert [path.name for path in folder.iterdir()] == ["out.jsonl"]
    assert (folder / "out.jsonl").read_text() == "old\n"


def test_score_does_not_overwrite_its_input(run: Run, tmp_path: Path, model: Path, bank: Path) -> None:
    data = write_rows(tmp_path / "in.jsonl", ROWS)
    before = data.read_bytes()
    assert_one_line_error(run("score", "--data", data, "--out", data, "--model", model, "--bank", bank), "--out")
    assert_one_line_error(run("score", "--data", data, "--out", tmp_path, "--model", model, "--bank", bank), "folder")
    assert data.read_bytes() == before


def test_eval_counts_a_row_only_where_its_label_is_known(run: Run, tmp_path: Path, model: Path, bank: Path) -> None:
    rows = [
        {"text": "one", "domains": ["violence"], "known": ["violence"]},
        {"text": "two", "domains": [], "known": ["violence", "politics"]},
    ]
    more = [{"text": "three", "domains": ["politics"], "known": []}, {"text": "four"}]
    files = (
        "--data",
        write_rows(tmp_path / "a.jsonl", rows),
        "--data",
        write_rows(tmp_path / "b.jsonl.gz", more),
    )
    result = run("eval", *files, "--json", "--model", model, "--bank", bank)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    counts = {domain: (q["n"], q["positives"]) for domain, q in found["domains"].items()}
    assert counts == {"violence": (2, 1), "politics": (2, 1), "pornography": (0, 0), "terror": (0, 0)}
    violence = found["domains"]["violence"]
    assert (violence["operating_point"]["tpr"], violence["operating_point"]["fpr"]) == (1.0, 1.0)
    assert found["domains"]["terror"]["auroc"] is None
    assert run("eval", *files, "--model", model, "--bank", bank).exit_code == 0


# ---- chat ----------------------------------------------------------------------------------------


def test_piped_lines_are_turns_and_quit_ends(run: Run, model: Path, bank: Path, lenient: Path) -> None:
    options = ("--model", model, "--bank", bank, "--policy", lenient, "--max-new-tokens", 4, "--json")
    result = run("chat", *options, stdin=b"hello\n\n\xff again\n/quit\nnever\n")
    assert result.exit_code == 0, result.stderr
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(turns) == 2
    assert all(turn["report"]["action"] == "allow" for turn in turns)
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"]  # the conversation goes on


def test_a_stopped_turn_shows_its_verdict_and_is_not_kept(run: Run, model: Path, bank: Path) -> None:
    options = ("--model", model, "--bank", bank, "--max-new-tokens", 4)
    shown = run("chat", *options, stdin="hello\nhello\n")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("block violence") == 2
    assert shown.stdout.count("stopped by a safety policy") == 2
    turns = [json.loads(line) for line in run("chat", *options, "--json", stdin="hello\nhello\n").stdout.splitlines()]
    assert turns[0]["finish_reason"] == "content_filter"
    assert turns[0]["prompt_tokens"] == turns[1]["prompt_tokens"]


def test_a_chat_that_outgrows_the_context_goes_on_after_clear(run: Run, model: Path, bank: Path, lenient: Path) -> None:
    options = ("--model", model, "--bank", bank, "--policy", lenient, "--max-new-tokens", 2, "--json")
    result = run("chat", *options, stdin="x" * 600 + "\n/clear\nhello\n")
    assert result.exit_code == 0
    assert "/clear" in result.stderr
    assert len(result.stdout.splitlines()) == 1


# ---- train ---------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, bank: Path) -> list[dict[str, Any]]:
    """The calls of the pipeline, which trains nothing here."""
    import training.pipeline

    calls: list[dict[str, Any]] = []

    def train_bank(**arguments: Any) -> Bank:
        calls.append(arguments)
        arguments["report"]("corpus", 1, 1, "2 documents")
        arguments["report"]("sae x", 1, 2, "half")
        arguments["report"]("sae x", 2, 2, "done")
        return Bank.load(bank)

    monkeypatch.setattr(training.pipeline, "train_bank", train_bank)
    return calls


def test_train_hands_the_pipeline_what_was_asked_for(
    run: Run, tmp_path: Path, model: Path, trained: list[dict[str, Any]]
) -> None:
    files = [write_rows(tmp_path / name, ROWS) for name in ("a.jsonl", "b.jsonl.gz")]
    out = tmp_path / "new.bank"
    result = run("train", "--data", files[0], files[1], "--out", out, "--model", model)
    assert result.exit_code == 0, result.stderr
    (call,) = trained
    assert (call["data"], call["out"], call["work"]) == (files, out, tmp_path / "new.bank.work")
    assert call["identity"].id == "tiny"
    assert "2 documents" in result.stderr
    assert "tiny@1+" in result.stdout


def test_train_takes_the_files_for_fitting_from_the_data_folder(
    run: Run, tmp_path: Path, model: Path, trained: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fit.jsonl.gz", "general.jsonl.gz", "dev.jsonl.gz"):
        write_rows(tmp_path / name, ROWS)
    monkeypatch.delenv("SAILGUARD_DATA", raising=False)
    assert_one_line_error(run("train", "--out", tmp_path / "x", "--model", model), "--data", "SAILGUARD_DATA")
    monkeypatch.setenv("SAILGUARD_DATA", str(tmp_path))
    assert run("train", "--out", tmp_path / "x", "--model", model).exit_code == 0
    assert [path.name for path in trained[0]["data"]] == ["fit.jsonl.gz", "general.jsonl.gz"]


def test_train_replaces_nothing_unasked(
    run: Run, tmp_path: Path, model: Path, bank: Path, trained: list[dict[str, Any]]
) -> None:
    data = write_rows(tmp_path / "a.jsonl", ROWS)
    options = ("--data", data, "--model", model)
    assert_one_line_error(run("train", *options, "--out", tmp_path), "no bank")
    assert_one_line_error(run("train", *options, "--out", bank), "--overwrite")
    assert_one_line_error(run("train", "--data", tmp_path / "gone", "--out", tmp_path / "n"), "gone")
    assert_one_line_error(run("train", *options, "--out", tmp_path / "n", "--preset", "gone"), "gone")
    assert trained == []
    assert run("train", *options, "--out", bank, "--overwrite").exit_code == 0


# ---- serve ---------------------------------------------------------------------------------------


def test_serve_listens_where_it_says(run: Run, bank: Path, lenient: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []

    def serve(settings: Any, engine: str, listener: socket.socket) -> None:
        with socket.create_connection(listener.getsockname(), timeout=5):
            served.append((settings, listener.getsockname()))

    monkeypatch.setattr(serve_command, "run_server", serve)
    monkeypatch.setenv("SAILGUARD_POLICY", str(lenient))
    result = run("serve", "--port", 0, "--bank", bank)
    assert result.exit_code == 0, result.stderr
    ((settings, address),) = served
    assert f"http://127.0.0.1:{address[1]}" in result.stderr
    assert (settings.bank, settings.policy, settings.model) == (bank, lenient, None)


def test_serve_refuses_what_it_cannot_serve(
    run: Run, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "run_server", lambda *_: pytest.fail("it served"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line_error(run("serve", "--port", port, "--bank", bank), str(port))
    assert_one_line_error(run("serve", "--port", 0, "--bank", tmp_path / "gone"), "bank.json")
    assert_one_line_error(run("serve", "--port", 0, "--bank", bank, "--policy", tmp_path / "gone"), "gone")
    monkeypatch.delenv("SAILGUARD_API_KEYS", raising=False)
    monkeypatch.delenv("SAILGUARD_API_KEYS_FILE", raising=False)
    assert_one_line_error(run("serve", "--host", "0.0.0.0", "--bank", bank), "host", "API keys")
