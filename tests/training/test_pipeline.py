"""From text to a bank that the guard takes: the same one, whatever interrupted the way there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from feature_bank.bank import HASHED, Bank
from feature_bank.errors import DataError
from feature_bank.formats.saelens import load_saelens
from feature_bank.identity import identify
from guard import Guard
from tests.factories import make_policy
from training.corpus import OWN_SOURCE, read_documents
from training.pipeline import load_preset, own_corpora, train_bank

HOOKS = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
PRESET: dict[str, Any] = {
    "name": "tiny",
    "version": "1",
    "hook_points": list(HOOKS),
    "labelled_tokens": 60,
    "general_tokens": 40,
    "general_budget": 1500,
    "sae": {"expansion": 4, "k": 4, "batch_tokens": 256, "epochs": 1, "lr": 5e-3},
    "pooling": {"window": 32, "min_tokens": 8, "ceiling": 1.0, "evidence_tokens": 2},
    "candidates": 20,
    "described_per_head": 12,
    "described_for_steering": 3,
    "admission": {"min_corr": None},
    "features_per_head": 8,
    "steering_features": 2,
    "canary": "A small bird sang in the garden; nobody listened, 42 times.",
    "own_corpora": False,
}
STAGES = (
    "corpus",
    "harvest",
    "contrast pairs",
    f"sae {HOOKS[0]}",
    f"sae {HOOKS[1]}",
    "discovery",
    "candidates",
    "detect",
    "ablate",
    "explain",
    "simulate",
    "records",
    "admit",
    "heads",
    "select",
    "material",
    "pack",
)
SAE_STAGE = STAGES.index(f"sae {HOOKS[0]}")
SECRET, HELD_OUT = "Zarquon", "Vogsphere"  # words that stand only in text that may not be shown
POLITICS = ["BALLOT", "SENATE", "QUORUM", "TREATY", "DECREE", "LOBBY"]
OTHERS = ["river", "garden", "kettle", "window", "pillow", "bread"]


class Workshop(NamedTuple):
    """What a run needs, bound to one folder of inputs."""

    model: Any
    tokenizer: Any
    folder: Path
    data: list[Path]

    def train(self, out: Path, work: Path, report: Callable[..., None] | None = None, **preset: Any) -> Bank:
        path = self.folder / "preset.yaml"
        path.write_text(yaml.safe_dump({**PRESET, "taxonomy": str(self.folder / "taxonomy"), **preset}))
        return train_bank(
            model=self.model,
            tokenizer=self.tokenizer,
            identity=identify(self.model, self.tokenizer, "tiny"),
            preset=load_preset(str(path)),
            data=self.data,
            out=out,
            work=work,
            report=report or (lambda *_: None),
        )


def write_taxonomy(folder: Path) -> None:
    """One domain, two concepts: each pair says the same with a word of politics and without."""
    folder.mkdir()
    concepts = []
    for number, words in enumerate((POLITICS[:3], POLITICS[3:])):
        pairs = [
            {
                "with": f"{words[i % 3]} {OTHERS[i % 6]} {i}",
                "without": f"{OTHERS[(i + 1) % 6]} {OTHERS[i % 6]} {i + 40 * (number + 1)}",
                "lang": "en",
                "genre": "news",
                "split": "test" if i % 4 == 3 else "train",
            }
            for i in range(12)
        ]
        concepts.append(
            {
                "id": f"words_{number}",
                "name": "Words",
                "definition": "Some of the words that stand for politics here, and nothing besides them.",
                "pairs": pairs,
                "hard_negatives": [{"text": f"{OTHERS[0]} {OTHERS[3]} {number}", "lang": "en", "kind": "everyday"}],
            }
        )
    subtopic = {"id": "all", "name": "All", "definition": concepts[0]["definition"], "concepts": concepts}
    (folder / "politics.yaml").write_text(yaml.safe_dump({"domain": "politics", "subtopics": [subtopic]}))


def rows() -> list[dict[str, Any]]:
    """Text about politics and about nothing, told apart by its words; a third of it may not be shown."""
    generator = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for i in range(160):
        positive = i % 2 == 0
        words = generator.choice(POLITICS if positive else OTHERS, 5).tolist()
        split = "test" if i % 8 < 2 else "fit"
        own = i % 6 < 4
        if split == "test" or not own:
            words.insert(2, HELD_OUT if own else SECRET)
        found.append(
            {
                "id": f"row-{i}",
                "text": " ".join(words),
                "role": ("prompt", "response", "passage")[i % 3],
                "domains": ["politics"] if positive else [],
                "known": ["politics"],
                "source": OWN_SOURCE if own else "elsewhere",
                "licence": "CC0-1.0",
                "split": split,
            }
        )
    return found


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Workshop:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=260,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        )
    folder = tmp_path_factory.mktemp("workshop")
    write_taxonomy(folder / "taxonomy")
    labelled, general = folder / "labelled.jsonl", folder / "general.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    words = [*POLITICS, *OTHERS, SECRET]
    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(words, 6)) for _ in range(50)]
    general.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Workshop(model.eval().requires_grad_(False), tiny_tokenizer, folder, [labelled, general])


class Trained(NamedTuple):
    """A finished run and what it reported."""

    bank: Bank
    out: Path
    work: Path
    reports: list[tuple[str, int, int, str]]


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Trained:
    """A run that nothing interrupted."""
    out, work, reports = workshop.folder / "bank", workshop.folder / "work", []
    bank = workshop.train(out, work, lambda *report: reports.append(report))
    return Trained(bank, out, work, reports)


def hashed(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in HASHED}


def test_the_bank_verifies_and_the_guard_takes_it(workshop: Workshop, trained: Trained) -> None:
    bank = Bank.load(trained.out)
    assert bank.content_hash == trained.bank.content_hash
    assert set(bank.heads) == {"politics"}
    assert bank.hook_names == HOOKS
    assert [record.rows for record in bank.manifest.corpus] == [160, 50]
    policy = make_policy({"domain": "politics", "scope": ["prompt", "response"], "action": "flag"})
    with Guard.from_bank(trained.out, policy=policy).attach(workshop.model, workshop.tokenizer) as attached:
        present, absent = attached.score([" ".join(POLITICS), " ".join(OTHERS)], ["passage", "passage"])
    assert present.scores["politics"] > 0.5 > absent.scores["politics"]


def test_a_separable_domain_is_read_on_held_out_text(trained: Trained) -> None:
    assert trained.bank.manifest.quality["test_auroc_politics"] > 0.8


def test_every_stage_is_reported_to_its_end(trained: Trained) -> None:
    assert list(dict.fromkeys(stage for stage, *_ in trained.reports)) == list(STAGES)
    for stage in set(STAGES) - {"heads"}:  # its total is that of all domains; those without labels are passed over
        last = [(done, total) for name, done, total, _ in trained.reports if name == stage][-1]
        assert last[0] == last[1], stage


def test_every_selected_row_is_that_of_the_full_sae(workshop: Workshop, trained: Trained) -> None:
    from guard.capture import pad_batch, truncated_forward

    ids, mask = pad_batch([workshop.tokenizer(" ".join(POLITICS + OTHERS))["input_ids"]], 0, workshop.model.device)
    hidden = truncated_forward(workshop.model, HOOKS, ids, mask)
    for name in HOOKS:
        sae, rows = load_saelens(trained.work / "saes" / name), trained.bank.rows[name]
        indices = [f.index for f in trained.bank.features if f.hook_name == name]
        assert sae.d_sae == 128
        np.testing.assert_array_equal(rows.W_enc, sae.W_enc[:, indices].numpy().astype(np.float16))
        np.testing.assert_array_equal(rows.W_dec, sae.W_dec[indices].numpy().astype(np.float16))
        np.testing.assert_array_equal(rows.threshold, sae.threshold[indices].numpy())
        x = hidden[name][0]
        pre = x.numpy() @ rows.W_enc + rows.b_enc
        whole = sae.encode(x)[:, indices].numpy()
        clear = np.abs(pre - rows.threshold) > 0.02 * np.abs(x.numpy()).max()
        assert clear.mean() > 0.9
        np.testing.assert_allclose(np.where(pre > rows.threshold, pre, 0)[clear], whole[clear], atol=0.02)


def test_a_second_run_with_the_cache_gives_the_same_bank(workshop: Workshop, trained: Trained, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int, str]] = []
    workshop.train(tmp_path / "again", trained.work, lambda *report: reports.append(report))
    assert hashed(tmp_path / "again") == hashed(trained.out)
    assert [done for stage, done, *_ in reports if stage == STAGES[SAE_STAGE]] == [1]  # read back, not trained


def test_interrupted_at_every_stage_it_gives_the_same_bank(
    workshop: Workshop, trained: Trained, tmp_path: Path
) -> None:
    for stage in STAGES:

        def interrupt(name: str, done: int, total: int, detail: str, stage: str = stage) -> None:
            if name == stage and (not name.startswith("sae") or done in (7, total)):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            workshop.train(tmp_path / "bank", tmp_path / "work", interrupt)
        assert (tmp_path / "bank").exists() == (stage == "pack")  # a bank is there whole or not at all
    assert hashed(tmp_path / "bank") == hashed(trained.out)
    workshop.train(tmp_path / "bank", tmp_path / "work")
    assert hashed(tmp_path / "bank") == hashed(trained.out)
    assert not list(tmp_path.rglob("*.tmp"))


def test_interrupted_between_an_sae_and_its_figures_it_gives_the_same_sae(
    workshop: Workshop, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("feature_bank.formats.saelens.json.dumps", _failing_on("metadata", json.dumps))
    with pytest.raises(KeyboardInterrupt):
        workshop.train(tmp_path / "bank", tmp_path / "work")
    assert list((tmp_path / "work" / "saes").iterdir()) == []  # they are there together or not at all
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        workshop.train(
            tmp_path / "bank", tmp_path / "work", lambda stage, *_: stop() if stage == "sae " + HOOKS[1] else None
        )
    weights = Path("saes") / HOOKS[0] / "sae_weights.safetensors"
    assert (tmp_path / "work" / weights).read_bytes() == (trained.work / weights).read_bytes()


def _failing_on(key: str, dumps: Callable[..., str]) -> Callable[..., str]:
    def failing(value: Any, **options: Any) -> str:
        if isinstance(value, dict) and key in value:
            raise KeyboardInterrupt
        return dumps(value, **options)

    return failing


@pytest.mark.parametrize("change", [{"seed": 1}, {"labelled_tokens": 50}, {"sae": {**PRESET["sae"], "k": 5}}])
def test_a_work_folder_of_another_run_is_refused(workshop: Workshop, trained: Trained, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"{trained.work} holds another run"):
        workshop.train(workshop.folder / "refused", trained.work, **change)


def test_text_that_may_not_be_shown_appears_nowhere_in_the_bank(trained: Trained) -> None:
    written = (trained.out / "features.jsonl").read_text() + (trained.out / "bank.json").read_text()
    assert any(feature.evidence for feature in trained.bank.features)
    for word in (SECRET, HELD_OUT):
        assert not any(part.lower() in written.lower() for part in (word, word[:6], word[-6:]))
    quotable = [r["text"] for r in rows() if r["source"] == OWN_SOURCE and r["split"] != "test"]
    for feature in trained.bank.features:
        for excerpt in feature.evidence:
            body = excerpt.text.rpartition("\n")[2]  # without what the chat template says about the speaker
            assert any(body in text for text in quotable), excerpt.text


def test_records_agree_with_heads_and_rows(trained: Trained) -> None:
    bank = trained.bank
    head = bank.heads["politics"]
    assert sum(weight != 0 for weight in head.weights) <= PRESET["features_per_head"]
    for feature in bank.features:
        assert feature.scores["auroc_politics_low"] <= feature.scores["auroc_politics"]
        assert 0.5 <= feature.scores["auroc_politics_null"] < 0.75
        assert feature.admitted
        assert not feature.refusals
        if feature.domains:
            assert head.weights[head.features.index(feature.id)] >= 0
            assert feature.scores["auroc_politics_low"] > 0.5
        assert list(feature.quantiles.values()) == sorted(feature.quantiles.values())
    ordered = [head.thresholds[rate] for rate in ("0.001", "0.01", "0.05")]
    assert ordered == sorted(ordered, reverse=True)
    for hook in bank.manifest.hook_points:
        assert hook.fires_precision > 0.5
        assert hook.fires_recall > 0.5


def test_text_without_labels_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    unlabelled = workshop._replace(data=workshop.data[1:])
    with pytest.raises(DataError, match=r"no row of the files has labels.*'domains', 'known'"):
        unlabelled.train(tmp_path / "bank", tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_labels_of_one_kind_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows() if row["domains"]))
    with pytest.raises(DataError, match="20 positive and 20 negative"):
        workshop._replace(data=[path]).train(tmp_path / "bank", tmp_path / "work")
    assert not (tmp_path / "bank").exists()


def test_unknown_presets_are_refused_by_name() -> None:
    for name in ("no-such-preset", "no-such-file.yaml"):
        with pytest.raises(DataError, match=f"{name}.*not found; shipped are smollm2-135m"):
            load_preset(name)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"colour": "blue"}, "field 'colour'"),
        ({"sae": {"expansions": 8}}, r"field 'sae\.expansions'"),
        ({"sae": {"k": 0}}, r"field 'sae\.k'"),
        ({"hook_points": []}, "field 'hook_points'"),
        ({"hook_points": ["layer 3"]}, "field 'hook_points'.*layer 3"),
        ({"hook_points": [HOOKS[0], HOOKS[0]]}, "field 'hook_points'.*one layer"),
        ({"hook_points": [HOOKS[0], "blocks.1.hook_mlp_out"]}, "field 'hook_points'.*one layer"),
        ({"pooling": None}, "field 'pooling'"),
        ({"canary": "short"}, "field 'canary'"),
    ],
)
def test_a_preset_with_a_wrong_field_is_refused_by_field(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump({**PRESET, **change}))
    with pytest.raises(DataError, match=rf"preset\.yaml', {complaint}"):
        load_preset(str(path))


@pytest.mark.parametrize("raw", [b"", b"- a\n- b\n", b"a: [", b"\xff\xfe\x00", b"name: \x00"])
def test_a_file_that_is_no_preset_is_refused_by_name(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "preset.yaml"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"preset\.yaml"):
        load_preset(str(path))


def test_the_shipped_preset_is_valid_and_has_text_to_train_on() -> None:
    preset = load_preset("smollm2-135m")
    assert preset.name == "smollm2-135m-instruct"
    assert len(preset.hook_points) == len(set(preset.hook_points)) > 1
    assert preset.own_corpora
    documents, _ = read_documents(own_corpora())
    for domain in ("pornography", "politics", "violence", "terror"):
        for split in ("discovery", "calibration", "test"):
            found = {d.label(domain) for d in documents if d.split == split}
            assert {True, False} <= found, (domain, split)
