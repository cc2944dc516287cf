"""A bank is read back as it was written, or refused with an error that names the file and the field."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from feature_bank import DOMAINS
from feature_bank.bank import FEATURES, HASHED, HEADS, MANIFEST, REVIEWS, WEIGHTS, Bank, save_bank, seal
from feature_bank.errors import BankError, SailguardError
from feature_bank.schema import Heads
from tests.factories import HOOKS, PER_HOOK, POOLING, make_bank

Change = Callable[[Any], object]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    return tmp_path / "bank"


def reseal(folder: Path, **changes: Any) -> None:
    """Write the manifest anew with right hashes, so that only what a test changed is wrong."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in HASHED}
    manifest.update(changes)
    manifest["sha256"] = manifest.pop("sha256", "0" * 64)
    (folder / MANIFEST).write_bytes(seal(json.dumps(manifest, indent=2).encode() + b"\n"))


def edit_manifest(folder: Path, change: Change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_bytes(seal(json.dumps(manifest, indent=2).encode() + b"\n"))


def edit_json(folder: Path, name: str, change: Change) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    reseal(folder)


def edit_feature(folder: Path, line: int, change: Change) -> None:
    lines = (folder / FEATURES).read_text().splitlines()
    record = json.loads(lines[line])
    change(record)
    lines[line] = json.dumps(record)
    (folder / FEATURES).write_text("\n".join(lines) + "\n")
    reseal(folder)


def edit_weights(folder: Path, change: Change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    reseal(folder)


def refusal(folder: Path) -> BankError:
    with pytest.raises(BankError) as error:
        Bank.load(folder)
    assert str(error.value.file) in str(error.value)
    return error.value


def test_bank_is_read_back_as_it_was_written(folder: Path) -> None:
    bank = Bank.load(folder)
    assert bank.hook_names == HOOKS
    assert [f.hook_name for f in bank.features] == [hook for hook in HOOKS for _ in range(PER_HOOK)]
    assert tuple(bank.heads) == DOMAINS
    assert bank.pooling == POOLING
    assert bank.version.startswith("tiny@1+")
    assert {path.name for path in folder.iterdir()} == {MANIFEST, FEATURES, WEIGHTS, HEADS, REVIEWS}
    again = save_bank(
        folder.parent / "again",
        manifest={
            k: v for k, v in bank.manifest.model_dump().items() if k not in ("schema_version", "files", "sha256")
        },
        features=bank.features,
        heads=Heads(pooling=bank.pooling, heads=bank.heads),  # type: ignore[arg-type]  # keys are domains
        rows=bank.rows,
    )
    assert again.content_hash == bank.content_hash
    for name in (MANIFEST, *HASHED):
        assert (folder / name).read_bytes() == (folder.parent / "again" / name).read_bytes()


@pytest.mark.parametrize("name", [MANIFEST, *HASHED])
def test_flipped_byte_anywhere_is_refused_and_named(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    offsets = {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1, len(whole) - 3}
    for offset in offsets:
        for flip in (0x01, 0x20, 0x80):
            damaged = bytearray(whole)
            damaged[offset] ^= flip
            (folder / name).write_bytes(damaged)
            error = refusal(folder)
            assert error.file == name or name == MANIFEST
    for damaged in (whole[:-1], whole + b"\n", b""):
        (folder / name).write_bytes(damaged)
        assert refusal(folder).file == name


@pytest.mark.parametrize("name", [MANIFEST, *HASHED])
def test_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder).file == name


def test_folder_that_is_no_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SailguardError, match=r"bank\.json"):
        Bank.load(tmp_path / "nowhere")
    (tmp_path / "f").write_text("x")
    with pytest.raises(SailguardError, match=r"bank\.json"):
        Bank.load(tmp_path / "f")


def test_reviews_can_be_appended(folder: Path) -> None:
    (folder / REVIEWS).write_text('{"feature": "L1/3"}\n')
    Bank.load(folder)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m.update(schema_version=2), "schema_version"),
        (lambda m: m.pop("schema_version"), "schema_version"),
        (lambda m: m.update(schema_version="1"), "schema_version"),
        (lambda m: m.update({"surprise": 1, "sha256": m.pop("sha256")}), "surprise"),
        (lambda m: m["model"].update(surprise=1), "model.surprise"),
        (lambda m: m["model"].pop("config_hash"), "model.config_hash"),
        (lambda m: m["model"].update(config_hash="abc"), "model.config_hash"),
        (lambda m: m["canary"].update(tolerance=2.0), "canary.tolerance"),
        (lambda m: m["canary"].update(activations={}), "canary.activations"),
        (lambda m: m["canary"].update(activations={"L9/9": 1.0}), "canary.activations"),
        (lambda m: m["files"].pop(HEADS), "files.heads.json"),
        (lambda m: m["hook_points"].append(m["hook_points"][0]), ""),
        (lambda m: m["quality"].update(x=float("nan")), "quality.x"),
    ],
)
def test_manifest_that_breaks_the_schema_is_refused_by_field(folder: Path, change: Change, field: str) -> None:
    edit_manifest(folder, change)
    error = refusal(folder)
    assert (error.file, error.field) == (MANIFEST, field)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_manifest_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert refusal(folder).file == MANIFEST


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda f: f.update(surprise=1), "surprise"),
        (lambda f: f.pop("explanation"), "explanation"),
        (lambda f: f.update(scale=0.0), "scale"),
        (lambda f: f.update(scale=float("inf")), "scale"),
        (lambda f: f.update(id="14/3"), "id"),
        (lambda f: f.update(domains=["weather"]), "domains.0"),
    ],
)
def test_feature_that_breaks_the_schema_is_refused_by_line_and_field(folder: Path, change: Change, field: str) -> None:
    edit_feature(folder, 4, change)
    error = refusal(folder)
    assert (error.file, error.field) == (f"{FEATURES}:5", field)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda f: f.update(hook_name="blocks.2.hook_resid_post"), "hook_name"),
        (lambda f: f.update(id="L1/10"), "id"),
    ],
)
def test_features_that_do_not_match_the_weights_are_refused(folder: Path, change: Change, field: str) -> None:
    edit_feature(folder, 0, change)
    error = refusal(folder)
    assert (error.file, error.field) == (FEATURES, field)


@pytest.mark.parametrize(
    ("feature", "hook", "field"),
    [
        ({"direction": "terror"}, {}, "direction"),  # a row of the SAE itself
        ({"index": 128, "id": "L1/128"}, {}, "direction"),  # beyond the SAE's rows, but not said to be a direction
        ({"index": 128, "id": "L1/128", "direction": "terror"}, {}, "n_directions"),
        ({}, {"n_directions": 1}, "n_directions"),
    ],
)
def test_directions_are_the_rows_beyond_the_sae_as_many_as_counted(
    folder: Path, feature: dict[str, Any], hook: dict[str, Any], field: str
) -> None:
    edit_feature(folder, 5, lambda f: f.update(feature))
    if hook:
        edit_manifest(folder, lambda m: m["hook_points"][0].update(hook))
    assert refusal(folder).field == field


def test_missing_feature_line_is_refused(folder: Path) -> None:
    lines = (folder / FEATURES).read_text().splitlines(keepends=True)
    (folder / FEATURES).write_text("".join(lines[:-1]))
    reseal(folder)
    assert refusal(folder).file == FEATURES


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda h: h["heads"].update(weather=h["heads"]["politics"]), "heads.weather.[key]"),
        (lambda h: h["heads"]["terror"]["weights"].pop(), "heads.terror"),
        (lambda h: h["heads"]["terror"]["features"].__setitem__(0, "L9/9"), "terror.features"),
        (
            lambda h: h["heads"]["terror"]["features"].__setitem__(0, h["heads"]["terror"]["features"][1]),
            "heads.terror",
        ),
        (lambda h: h["heads"]["terror"].update(bias=float("nan")), "heads.terror.bias"),
        (lambda h: h["heads"]["terror"]["calibration"].update(slope=-1.0), "heads.terror.calibration.slope"),
        (lambda h: h["heads"]["terror"]["thresholds"].update({"0.01": 1.5}), "heads.terror.thresholds.0.01"),
        (lambda h: h["pooling"].update(window=0), "pooling.window"),
        (lambda h: h.update(heads={}), "heads"),
    ],
)
def test_heads_that_break_the_schema_are_refused_by_field(folder: Path, change: Change, field: str) -> None:
    edit_json(folder, HEADS, change)
    error = refusal(folder)
    assert (error.file, error.field) == (HEADS, field)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "threshold"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "missing"),
        (lambda t: t[..., :-1], "shape"),
        (lambda t: np.full_like(t, np.nan), "NaN"),
        (lambda t: np.full_like(t, np.inf), "infinity"),
        (lambda t: np.float32(1.0).reshape(()), "shape"),
    ],
)
def test_weights_that_are_wrong_are_refused_by_tensor(folder: Path, name: str, change: Change, message: str) -> None:
    field = f"{HOOKS[1]}.{name}"

    def apply(tensors: dict[str, Any]) -> None:
        changed = change(tensors.pop(field))
        if changed is not None:
            tensors[field] = np.ascontiguousarray(changed)

    edit_weights(folder, apply)
    error = refusal(folder)
    assert (error.file, error.field) == (WEIGHTS, field)
    assert message in str(error)


def test_interrupted_save_leaves_the_old_bank(
    folder: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bank.load(folder).content_hash

    def interrupted(path: Path) -> Bank:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bank, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_bank(folder, tiny_model, tiny_tokenizer, seed=5)
    monkeypatch.undo()
    assert Bank.load(folder).content_hash == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_save_refuses_what_the_reader_would_refuse(folder: Path) -> None:
    bank = Bank.load(folder)
    manifest = {k: v for k, v in bank.manifest.model_dump().items() if k not in ("schema_version", "files", "sha256")}
    with pytest.raises(BankError, match="one by one"):
        save_bank(
            folder.parent / "bad",
            manifest=manifest,
            features=bank.features[:-1],
            heads=Heads(pooling=bank.pooling, heads=bank.heads),  # type: ignore[arg-type]  # keys are domains
            rows=bank.rows,
        )
    assert not (folder.parent / "bad").exists()


def test_hash_covers_every_file_but_the_reviews(folder: Path, tmp_path: Path) -> None:
    first = Bank.load(folder).content_hash
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert Bank.load(copy).content_hash == first
    edit_feature(copy, 0, lambda f: f.update(explanation="another"))
    assert Bank.load(copy).content_hash != first


def test_nothing_in_a_bank_is_pickled(folder: Path) -> None:
    for path in folder.iterdir():
        assert path.suffix in (".json", ".jsonl", ".safetensors")
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
