"""From text to a bank that the guard takes: the same one, whatever interrupted the way there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from feature_bank.bank import HASHED, Bank
from feature_bank.errors import DataError
from feature_bank.formats.saelens import load_saelens
from feature_bank.taxonomy import DOMAINS
from guard import Guard
from tests.factories import make_policy
from tests.training.workshop import (
    HELD_OUT,
    HOOKS,
    OTHERS,
    POLITICS,
    PRESET,
    SECRET,
    Trained,
    Workshop,
    rows,
)
from training.corpus import OWN_SOURCE, read_documents
from training.pipeline import load_preset, own_corpora

STAGES = (
    "corpus",
    "harvest",
    "contrast pairs",
    f"sae {HOOKS[0]}",
    f"sae {HOOKS[1]}",
    "directions",
    "discovery",
    "candidates",
    "detect",
    "ablate",
    "explain",
    "simulate",
    "records",
    "admit",
    "heads",
    "steering",
    "select",
    "material",
    "pack",
)
SAE_STAGE = STAGES.index(f"sae {HOOKS[0]}")


def hashed(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in HASHED}


def test_the_bank_verifies_and_the_guard_takes_it(workshop: Workshop, trained: Trained) -> None:
    bank = Bank.load(trained.out)
    assert bank.content_hash == trained.bank.content_hash
    assert set(bank.heads) == {"politics"}
    assert bank.hook_names == HOOKS
    assert [(record.name, record.rows) for record in bank.manifest.corpus] == [
        ("labelled.jsonl", 160),
        ("general.jsonl", 50),
        ("taxonomy/politics.yaml", 50),
    ]
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
        features = [f for f in trained.bank.features if f.hook_name == name]
        indices = [f.index for f in features if not f.direction]
        assert sae.d_sae == 128
        assert [f.index >= 128 for f in features] == [bool(f.direction) for f in features]
        n = len(indices)  # directions come last
        np.testing.assert_array_equal(rows.W_enc[:, :n], sae.W_enc[:, indices].numpy().astype(np.float16))
        np.testing.assert_array_equal(rows.W_dec[:n], sae.W_dec[indices].numpy().astype(np.float16))
        np.testing.assert_array_equal(rows.threshold[:n], sae.threshold[indices].numpy())
        x = hidden[name][0]
        pre = (x.numpy() @ rows.W_enc + rows.b_enc)[:, :n]
        whole = sae.encode(x)[:, indices].numpy()
        clear = np.abs(pre - rows.threshold[:n]) > 0.02 * np.abs(x.numpy()).max()
        assert clear.mean() > 0.9
        np.testing.assert_allclose(np.where(pre > rows.threshold[:n], pre, 0)[clear], whole[clear], atol=0.02)


def test_directions_say_what_they_are_of_and_are_told_apart_from_the_saes_features(trained: Trained) -> None:
    concepts = {c.concept for f in trained.bank.features for c in f.concept_scores}
    names = {*DOMAINS, *(f"{d}/{c}" for d in DOMAINS for c in concepts)}
    directions = [f for f in trained.bank.features if f.direction]
    assert directions
    assert {f.direction for f in directions} <= names
    for hook in trained.bank.manifest.hook_points:
        assert hook.d_sae == 128
        assert hook.n_directions == sum(f.hook_name == hook.hook_name for f in directions)


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
        workshop.train(tmp_path / "bank", tmp_path / "work", lambda stage, *_: stop() if stage == "discovery" else None)
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
