"""`bank import` and `bank export`, run for real on made-up files: what is written loads, and what is lost is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from feature_bank.bank import Bank
from feature_bank.interop.collection import load_collection
from guard import Guard
from guard.models import load_model
from service.cli import EXIT_ERROR, build_app
from tests.factories import make_policy
from tests.feature_bank.formats.samples import D_SAE, safe_sail_tensors, write_torch
from tests.feature_bank.interop.samples import ROWS, write_database

PUBLISHED = Path(os.environ.get("SAILGUARD_DATA") or "/nowhere") / "safe_sail" / "en_db.json.gz"
Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    def invoke(*args: object) -> Any:
        return CliRunner().invoke(build_app(), ["bank", *(str(arg) for arg in args)])

    return invoke


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return write_database(tmp_path / "db.json.gz")


@pytest.fixture
def model(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=260,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "tiny-qwen2")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny-qwen2")
    return tmp_path / "tiny-qwen2"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Of layers 1 and 2; the encoders stack three SAEs. A random model's MLP adds little, so they are loud."""
    for layer in (1, 2):
        tensors = safe_sail_tensors(d_in=8)
        tensors["encoder.bias"] = tensors["encoder.bias"].abs() + 0.1
        write_torch(tmp_path / "checkpoints" / f"ckpt_layer{layer}.pt", tensors)
    return tmp_path / "checkpoints"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"{i} river {i * i} garden {i * 7 % 13}", "licence": "CC0-1.0"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_error(result: Any, *parts: object) -> None:
    """One line on standard error, without a traceback."""
    assert result.exit_code == EXIT_ERROR, result.output
    (line,) = result.stderr.splitlines()
    assert result.stdout == ""
    for part in parts:
        assert str(part) in line


def test_a_database_becomes_a_collection_with_counts(tmp_path: Path, run: Run, database: Path) -> None:
    result = run("import", "safe-sail", database, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["kind"], summary["features"], summary["tagged"]) == ("collection", len(ROWS), 5)
    assert summary["tagged_by_domain"] == {"politics": 3, "violence": 2, "terror": 2}
    assert summary["tagged_by_domain_and_layer"]["violence"] == {"1": 1, "2": 1}
    assert (summary["masked"], summary["unexplained"], summary["losses"]) == (1, 1, [])
    assert len(load_collection(tmp_path / "out").features) == len(ROWS)
    text = run("import", "safe-sail", database, "--out", tmp_path / "again")
    assert "6 features, 5 with a domain's tag" in text.stdout
    assert text.stdout.splitlines()[1].split() == ["domain", "layer", "1", "layer", "2", "all"]


def test_a_collection_is_listed_searched_and_shown(tmp_path: Path, run: Run, database: Path) -> None:
    sail = tmp_path / "sail"
    run("import", "safe-sail", database, "--out", sail)
    features = {feature.id: feature for feature in load_collection(sail).features}

    def ids(*args: object) -> list[str]:
        return [row["id"] for row in json.loads(run(*args, "--json").stdout)]

    assert ids("list", sail) == list(features)
    assert ids("list", sail, "--limit", 2) == list(features)[:2]
    assert ids("list", sail, "--domain", "violence") == [k for k, f in features.items() if "violence" in f.domains]
    best = max(features.values(), key=lambda f: f.scores["corr_safe_sail"])
    assert ids("list", sail, "--min-score", f"corr_safe_sail={best.scores['corr_safe_sail']}") == [best.id]
    told = next(f for f in features.values() if f.explanations and not f.masked)
    assert told.id in ids("search", told.explanations[0].text, sail)
    assert ids("search", "zyzzyva", sail) == []
    card = run("show", told.id, sail)
    assert card.exit_code == 0
    assert told.explanations[0].text in card.stdout
    assert json.loads(run("show", told.id, sail, "--json").stdout) == told.model_dump()
    assert f"{len(features)} of {len(features)} features" in run("list", sail).stdout
    assert "0 of 0 features" in run("search", "zyzzyva", sail).stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["list", "--concept", "politics/election_campaign"], ["--concept"]),
        (["list", "--admitted", "--sort", "density"], ["--admitted", "--sort"]),
        (["search", "a", "--status", "accepted"], ["--status"]),
        (["list", "--min-score", "0.5"], ["'auroc'", "corr_safe_sail"]),
        (["show", "L9/99"], ["L9/99"]),
    ],
)
def test_what_a_collection_has_nothing_for_is_refused(
    tmp_path: Path, run: Run, database: Path, arguments: list[str], parts: list[str]
) -> None:
    run("import", "safe-sail", database, "--out", tmp_path / "sail")
    places = 2 if arguments[0] in ("search", "show") else 1
    assert_error(run(*arguments[:places], tmp_path / "sail", *arguments[places:]), *parts)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="SAILGUARD_DATA names no folder with the published database")
def test_the_published_database_is_imported_whole(tmp_path: Path, run: Run) -> None:
    result = run("import", "safe-sail", PUBLISHED, "--out", tmp_path / "out", "--json")
    summary = json.loads(result.stdout)
    assert (summary["features"], summary["tagged"], summary["losses"]) == (4700, 1758, [])


def test_with_a_checkpoint_it_becomes_a_bank_that_the_guard_attaches(
    tmp_path: Path, run: Run, database: Path, model: Path, checkpoints: Path, texts: Path
) -> None:
    arguments = ("--checkpoint", checkpoints, "--index", 1, "--k", 8, "--model", model, "--data", texts)
    result = run("import", "safe-sail", database, "--out", tmp_path / "bank", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    bank = Bank.load(tmp_path / "bank")
    assert (summary["kind"], summary["version"], summary["features"]) == ("bank", bank.version, 5)
    assert bank.manifest.name == "safe-sail-tiny-qwen2"
    assert summary["by_domain_and_layer"]["terror"] == {"2": 2}
    assert summary["left_out"] == {"it carries no domain's tag": 1}
    assert summary["features_by_head"] == {"politics": 2, "violence": 2, "terror": 2}
    assert summary["quality"] == {f"calibrated_{domain}": 0.0 for domain in ("politics", "violence", "terror")}
    assert any("never steered" in note for note in summary["notes"])
    assert [hook.d_sae for hook in bank.manifest.hook_points] == [D_SAE, D_SAE]
    loaded = load_model(model, device="cpu")
    policy = make_policy(*({"domain": domain, "action": "flag"} for domain in bank.heads))
    with Guard.from_bank(tmp_path / "bank", policy=policy).attach(loaded.model, loaded.tokenizer) as attached:
        assert attached.chat([{"role": "user", "content": "a river"}], max_new_tokens=3).report.tokens_observed == 3
    # The same once more, in words, over what is there
    again = run("import", "safe-sail", database, "--out", tmp_path / "bank", *arguments, "--overwrite")
    assert again.exit_code == 0, again.stderr
    assert "left out: 1 features (it carries no domain's tag)" in again.stdout
    assert run("verify", tmp_path / "bank", "--model", model).exit_code == 0
    assert_error(run("import", "safe-sail", database, "--out", tmp_path / "bank", *arguments), "--overwrite")


def test_a_bank_goes_out_to_neuronpedias_layout_and_in_again(
    tmp_path: Path, run: Run, write_bank: Callable[..., Path]
) -> None:
    bank = write_bank(tmp_path / "bank")
    (bank / "reviews.jsonl").write_text("{}\n{}\n")
    result = run("export", "neuronpedia", bank, "--out", tmp_path / "out", "--model-id", "tiny-1", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["model_id"], summary["sources"]) == ("tiny-1", ["1-sailguard-res-8"])
    assert (summary["features"], summary["explanations"], summary["activations"]) == (2, 2, 0)
    losses = {loss["field"]: loss["count"] for loss in summary["losses"]}
    assert (losses["domains"], losses["evidence"], losses["bank.reviews"]) == (2, 2, 2)

    back = run("import", "neuronpedia", tmp_path / "out", "--out", tmp_path / "collection", "--json")
    assert back.exit_code == 0, back.stderr
    found = json.loads(back.stdout)
    assert (found["kind"], found["source"], found["model"], found["features"]) == (
        "collection",
        "neuronpedia",
        "tiny-1",
        2,
    )
    collection = load_collection(tmp_path / "collection")
    assert [f.explanation for f in collection.features] == ["never on", "always on"]
    text = run("export", "neuronpedia", bank, "--out", tmp_path / "text").stdout
    assert "lost: domains (2): features carry no tags there" in text
    assert "tiny/1-sailguard-res-8" in text


def test_nothing_else_is_replaced(tmp_path: Path, run: Run, database: Path, write_bank: Callable[..., Path]) -> None:
    bank = write_bank(tmp_path / "bank")
    for command in (
        ("import", "safe-sail", database, "--out", bank, "--overwrite"),
        ("import", "neuronpedia", tmp_path, "--out", bank, "--overwrite"),
    ):
        assert_error(run(*command), bank, "no collection")
    assert_error(run("export", "neuronpedia", bank, "--out", bank), "new folder")
    assert run("import", "safe-sail", database, "--out", tmp_path / "out").exit_code == 0
    assert_error(run("import", "safe-sail", database, "--out", tmp_path / "out"), "--overwrite")
    assert run("import", "safe-sail", database, "--out", tmp_path / "out", "--overwrite").exit_code == 0
    Bank.load(bank)


def test_errors_are_one_line_that_names_the_place(
    tmp_path: Path, run: Run, database: Path, model: Path, checkpoints: Path, texts: Path
) -> None:
    out = ("--out", tmp_path / "out")
    assert_error(run("import", "safe-sail", tmp_path / "no.json", *out), "no.json")
    bad = write_database(tmp_path / "bad.json", {"1_5": {**ROWS["1_5"], "tag_list": ["weather"]}})
    assert_error(run("import", "safe-sail", bad, *out), "bad.json", "1_5.tag_list", "weather")
    assert_error(run("import", "safe-sail", database, *out, "--model", model), "--model", "--checkpoint")
    checked = ("--checkpoint", checkpoints, "--model", model)
    assert_error(run("import", "safe-sail", database, *out, *checked, "--data", texts), "'index'", "0 to 2")
    assert_error(run("import", "safe-sail", database, *out, *checked, "--data", tmp_path / "no.jsonl"), "no.jsonl")
    other = write_database(tmp_path / "other.json", {"9_5": ROWS["1_5"]})
    chosen = ("--index", 1, "--k", 8, "--data", texts)
    assert_error(run("import", "safe-sail", other, *out, *checked, *chosen), "none of the 1 features has rows")
    assert_error(run("import", "neuronpedia", tmp_path / "nowhere", *out), "nowhere")
    assert_error(run("export", "neuronpedia", tmp_path, *out), "bank.json")
    assert not (tmp_path / "out").exists()


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path, run: Run, database: Path, model: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"encoder.weight": Evil()}, tmp_path / "ckpt_layer1.pt")
    result = run(
        "import",
        "safe-sail",
        database,
        "--out",
        tmp_path / "out",
        "--checkpoint",
        tmp_path / "ckpt_layer1.pt",
        "--model",
        model,
    )
    assert_error(result, "ckpt_layer1.pt", "refused")
    assert not (tmp_path / "ran").exists()
