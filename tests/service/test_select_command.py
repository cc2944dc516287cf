"""`train select`, run for real on the tiny model with an SAE that knows one concept and one that knows nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from feature_bank.formats.saelens import save_saelens
from feature_bank.sae import SAE
from service.cli import EXIT_ERROR, build_app

Run = Callable[..., Any]
HOOK, LATER = "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"
WIDTH, D_SAE = 32, 40
TOWNS = ("Ghent", "Turin", "Bath", "Split", "Cork", "Graz")


@pytest.fixture
def model(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def taxonomy(tmp_path: Path) -> Path:
    """Two concepts of politics; the letter v stands on the positive side of the first alone."""
    folder = tmp_path / "taxonomy"
    folder.mkdir()
    definition = "What is long enough to count as a definition here."
    concepts = []
    for name, words in (("votes", ("vote", "sing")), ("laws", ("bills", "cakes"))):
        pairs = [
            {
                "with": f"{town}: they {words[0]} {number}",
                "without": f"{town}: they {words[1]} {number}",
                "lang": "zh" if number == 5 else "en",
                "genre": "chat" if number % 2 else "news",
                "split": "test" if number > 3 else "train",
            }
            for number, town in enumerate(TOWNS)
        ]
        hard = [{"text": f"a {name} quiz", "lang": "en", "kind": "everyday"}]
        concepts.append({"id": name, "name": name, "definition": definition, "pairs": pairs, "hard_negatives": hard})
    subtopic = {"id": "all", "name": "All", "definition": definition, "concepts": concepts}
    (folder / "politics.yaml").write_text(yaml.safe_dump({"domain": "politics", "subtopics": [subtopic]}))
    return folder


@pytest.fixture
def run(model: Path, taxonomy: Path, tmp_path: Path) -> Run:
    def invoke(*args: object, out: Path = tmp_path / "out") -> Any:
        words = ["train", "select", *map(str, args), "--out", str(out), "--permutations", "40"]
        for option, value in (("--model", model), ("--taxonomy", taxonomy)):
            if option not in words:
                words += [option, str(value)]
        return CliRunner().invoke(build_app(), words, env={"COLUMNS": "100"})

    return invoke


def write_sae(folder: Path, direction: Any = None, *, hook_name: str = HOOK, d_in: int = WIDTH, seed: int = 0) -> Path:
    """An SAE of features that fire now and then; the first, if a direction is given, where it alone stands."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, d_in, generator=generator), dim=1)
    threshold = torch.full((D_SAE,), 1.5 * (0.02 if hook_name == HOOK else 0.05))
    W_enc = W_dec.T.clone()
    if direction is not None:
        W_enc[:, 0] = direction / direction.norm() ** 2
        threshold[0] = 0.95
    sae = SAE(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=torch.zeros(D_SAE),
        b_dec=torch.zeros(d_in),
        threshold=threshold,
        hook_name=hook_name,
        apply_b_dec_to_input=False,
    )
    figures = {"training": {"figures": {"fvu": 0.5}}}
    save_saelens(sae, folder, model_name="tiny", metadata=figures)
    return folder


@pytest.fixture
def saes(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A folder as a sweep leaves it: two SAEs of one layer, of which one reads the letter v, and one of another."""
    letter = tiny_tokenizer("v", add_special_tokens=False)["input_ids"]
    direction = tiny_model.get_input_embeddings().weight[letter[0]].detach()
    write_sae(tmp_path / "sweep" / "saes" / HOOK / "knows", direction)
    write_sae(tmp_path / "sweep" / "saes" / HOOK / "guesses")
    write_sae(tmp_path / "sweep" / "saes" / LATER / "guesses", hook_name=LATER)
    (tmp_path / "sweep" / "saes" / ".half").mkdir()
    return tmp_path / "sweep"


def assert_error(result: Any, *parts: object) -> None:
    """One line on standard error, without a traceback."""
    assert result.exit_code == EXIT_ERROR, result.output
    (line,) = result.stderr.splitlines()
    for part in parts:
        assert str(part) in line


def test_a_sweeps_folder_is_ranked_and_the_sae_that_knows_a_concept_comes_first(
    run: Run, saes: Path, tmp_path: Path
) -> None:
    result = run(saes)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["SAE", "L0", "separation", "I_CDF", "its", "null"]
    assert lines[1].split()[0] == "knows"
    assert "knows separates best" in result.stdout
    assert f"At {HOOK}: knows" in result.stdout
    out = tmp_path / "out"
    record = json.loads((out / "selection.json").read_text())
    assert record["choice"]["overall"] == "knows"
    assert record["choice"]["by_hook_point"] == {HOOK: "knows", LATER: f"{LATER}/guesses"}
    assert record["model"]["id"] == "tiny"
    assert record["taxonomy"]["pairs"] == 12
    first = record["saes"][0]
    assert first["training"] == {"fvu": 0.5}
    votes = first["domains"]["politics"]["concepts"]["votes"]
    assert votes["best_frequency"] == 1
    assert votes["pairs"] == 6
    with (out / "selection.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["concept"]) for row in rows[:3]] == [("knows", ""), ("knows", "laws"), ("knows", "votes")]
    assert (out / "selection.png").stat().st_size > 10_000


def test_json_is_what_is_written_and_a_second_run_does_not_run_the_model(
    run: Run, saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(saes, "--json")
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout)
    assert record == json.loads((tmp_path / "out" / "selection.json").read_text())
    monkeypatch.setattr("training.harvest._capture", lambda *_: pytest.fail("the pairs were harvested again"))
    write_sae(tmp_path / "more", seed=1)
    again = run(saes, tmp_path / "more", saes / "saes" / HOOK / "knows", "--split", "train", "--lang", "en", "--json")
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert len(found["saes"]) == 4  # the one that is named twice is one
    assert found["taxonomy"]["pairs"] == 8
    assert found["taxonomy"]["sha256"] == record["taxonomy"]["sha256"]


def test_errors_are_one_line_before_the_model_is_loaded(
    run: Run, saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "ae.pt").write_bytes(b"not to be opened")
    (tmp_path / "foreign" / "config.json").write_text("{}")
    assert_error(run(tmp_path / "none"), "no such folder")
    assert_error(run(tmp_path / "empty"), "holds no SAE", "train saes")
    assert_error(run(tmp_path / "foreign"), "sailguard sae convert")
    assert_error(run(saes, out=tmp_path / "full"), "something else")
    assert_error(run(saes, "--taxonomy", tmp_path / "empty"), "holds no taxonomy")
    assert_error(run(saes, "--lang", "fr"), "politics.yaml", "no contrast pair in fr")
    (saes / "saes" / HOOK / "knows" / "sae_weights.safetensors").write_bytes(b"cut")
    assert_error(run(saes), "sae_weights.safetensors")


def test_a_concept_without_positives_is_refused(run: Run, saes: Path, taxonomy: Path) -> None:
    path = taxonomy / "politics.yaml"
    data = yaml.safe_load(path.read_text())
    data["subtopics"][0]["concepts"][1]["pairs"] = []
    path.write_text(yaml.safe_dump(data))
    assert_error(run(saes), "politics.yaml", "subtopics.0.concepts.1.pairs")
    del data["subtopics"][0]["concepts"][1]
    del data["subtopics"][0]["concepts"][0]["pairs"][2]["with"]
    path.write_text(yaml.safe_dump(data))
    assert_error(run(saes), "politics.yaml", "subtopics.0.concepts.0.pairs.2")


def test_saes_of_another_model_are_refused_before_the_pairs_are_read(run: Run, saes: Path, tmp_path: Path) -> None:
    wide = write_sae(tmp_path / "wide", d_in=WIDTH + 8)
    assert_error(run(saes, wide), "wide", "another model", WIDTH + 8)
    deep = write_sae(tmp_path / "deep", hook_name="blocks.30.hook_resid_post")
    assert_error(run(saes, deep), "blocks.30.hook_resid_post", "layers 0 to 3")
    odd = write_sae(tmp_path / "odd", hook_name="blocks.1.attn.hook_z")
    assert_error(run(saes, odd), "blocks.1.attn.hook_z", "not known")
    assert not (tmp_path / "out").exists()
