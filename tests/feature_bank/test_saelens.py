"""SAELens folders: what is written is read back to the bit, and what cannot be read is refused by file and field."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from feature_bank.errors import BankError
from feature_bank.formats import load_sae, read_source
from feature_bank.formats.saelens import CONFIG_FILE, WEIGHTS_FILE, load_saelens, save_saelens
from feature_bank.sae import SAE
from tests.feature_bank.formats import samples

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def make_sae(dtype: torch.dtype = torch.float32, *, subtract: bool = True) -> SAE:
    return SAE(
        W_enc=torch.randn(8, 20).to(dtype),
        W_dec=torch.randn(20, 8).to(dtype),
        b_enc=torch.randn(20).to(dtype),
        b_dec=torch.randn(8).to(dtype),
        threshold=torch.rand(20).to(dtype),
        hook_name="blocks.2.hook_resid_post",
        apply_b_dec_to_input=subtract,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_saelens(make_sae(), tmp_path / "sae", model_name="tiny")
    return tmp_path / "sae"


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    cfg = json.loads((folder / CONFIG_FILE).read_text())
    change(cfg)
    (folder / CONFIG_FILE).write_text(json.dumps(cfg))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("subtract", [True, False])
def test_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype, subtract: bool) -> None:
    sae = make_sae(dtype, subtract=subtract)
    save_saelens(sae, tmp_path / "a", model_name="tiny", metadata={"context_size": 128})
    found = load_saelens(tmp_path / "a")
    for name in TENSORS:
        assert getattr(found, name).dtype == dtype
        assert torch.equal(getattr(found, name), getattr(sae, name))
    assert (found.hook_name, found.apply_b_dec_to_input) == (sae.hook_name, subtract)
    save_saelens(found, tmp_path / "b", model_name="tiny", metadata={"context_size": 128})
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_selection_and_transposed_views_survive_the_round_trip(tmp_path: Path) -> None:
    sae = make_sae()
    tied = SAE(
        W_enc=sae.W_dec.T,
        W_dec=sae.W_dec,
        b_enc=sae.b_enc,
        b_dec=sae.b_dec,
        threshold=sae.threshold,
        hook_name=sae.hook_name,
    ).select([3, 1])
    save_saelens(tied, tmp_path / "sae", model_name="tiny")
    x = torch.randn(4, 8)
    assert torch.equal(load_saelens(tmp_path / "sae").encode(x), tied.encode(x))


def test_configuration_is_that_of_saelens(folder: Path) -> None:
    cfg = json.loads((folder / CONFIG_FILE).read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == ("jumprelu", 8, 20, "float32")
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: c.update(architecture="temporal"), "architecture"),
        (lambda c: c.update(architecture="topk"), "k"),
        (lambda c: c.update(architecture=7), "architecture"),
        (lambda c: c.pop("architecture"), "architecture"),
        (lambda c: c.update(normalize_activations="layer_norm"), "normalize_activations"),
        (lambda c: c.update(normalize_activations="constant_norm_rescale"), "normalize_activations"),
        (lambda c: c.update(normalize_activations="covariance_whitening"), "normalize_activations"),
        (lambda c: c.update(normalize_activations="expected_average_only_in"), "normalize_activations"),
        (lambda c: c.update(activation_fn="tanh-relu"), "activation_fn"),
        (lambda c: c.update(apply_b_dec_to_input=1), "apply_b_dec_to_input"),
        (lambda c: c["metadata"].update(hook_name=3), "metadata.hook_name"),
        (lambda c: c["metadata"].update(sae_lens_version="six"), "metadata.sae_lens_version"),
        (lambda c: c.update(reshape_activations="hook_z"), "reshape_activations"),
        (lambda c: c["metadata"].pop("hook_name"), "metadata.hook_name"),
        (lambda c: c.update(metadata=None), "metadata.hook_name"),
        (lambda c: c.update(apply_b_dec_to_input="no"), "apply_b_dec_to_input"),
        (lambda c: c.update(d_sae=21), "d_sae"),
        (lambda c: c.update(d_in=9), "d_in"),
    ],
)
def test_configuration_that_is_not_supported_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    edit_config(folder, change)
    with pytest.raises(BankError) as error:
        load_saelens(folder)
    assert (error.value.file, error.value.field) == (str(folder / CONFIG_FILE), field)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "missing"),
        (lambda t: t.flatten()[:-1].clone(), "shape"),
        (lambda t: t.clone().fill_(float("nan")), "NaN"),
        (lambda t: t.clone().fill_(float("inf")), "infinity"),
        (lambda t: t.long(), "dtype"),
    ],
)
def test_tensor_that_is_wrong_is_refused_by_name(
    folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str
) -> None:
    def apply(tensors: dict[str, Any]) -> None:
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed

    edit_weights(folder, apply)
    with pytest.raises(BankError, match=message) as error:
        load_saelens(folder)
    assert (error.value.file, error.value.field) == (str(folder / WEIGHTS_FILE), name)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_file_that_is_missing_or_damaged_is_refused_by_name(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(BankError) as error:
        load_saelens(folder)
    assert error.value.file == str(folder / name)


def test_existing_folder_is_replaced_whole(folder: Path) -> None:
    (folder / "stale.txt").write_text("x")
    save_saelens(make_sae(), folder, model_name="tiny")
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# Every SAE that can be kept, and what SAELens calls it.
ARCHITECTURES = {
    "relu": "standard",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "relu transcoder": "transcoder",
    "relu skip transcoder": "skip_transcoder",
    "jumprelu transcoder": "jumprelu_transcoder",
    "jumprelu skip transcoder": "jumprelu_skip_transcoder",
    "topk transcoder": "topk_transcoder",
    "topk skip transcoder": "topk_skip_transcoder",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_survives_the_round_trip_to_the_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    sae = samples.make_sae(kind, dtype)
    save_saelens(sae, tmp_path / "a", model_name="tiny")
    found = load_saelens(tmp_path / "a")
    for name in (*TENSORS, "W_skip"):
        wanted = getattr(sae, name)
        assert (getattr(found, name) is None) == (wanted is None)
        assert wanted is None or torch.equal(getattr(found, name), wanted)
    for field in ("k", "hook_name", "hook_name_out", "apply_b_dec_to_input", "encoder_only"):
        assert getattr(found, field) == getattr(sae, field)
    x = samples.normal(5, samples.D_IN, dtype=dtype)
    assert torch.equal(found.encode(x), sae.encode(x))
    assert torch.equal(found.reconstruct(x), sae.reconstruct(x))


@pytest.mark.parametrize(("kind", "architecture"), ARCHITECTURES.items())
def test_configuration_has_the_fields_of_its_architecture(tmp_path: Path, kind: str, architecture: str) -> None:
    save_saelens(samples.make_sae(kind), tmp_path / "a", model_name="tiny")
    cfg = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert cfg["architecture"] == architecture
    assert ("k" in cfg, "rescale_acts_by_decoder_norm" in cfg) == ("topk" in kind,) * 2
    assert cfg.get("d_out") == (samples.D_OUT if "transcoder" in kind else None)
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert ("threshold" in tensors) == ("jumprelu" in kind)
    if "skip" in kind:
        assert tensors["W_skip"].shape == (samples.D_OUT, samples.D_IN)


def test_tensors_of_several_dtypes_are_written_in_the_widest(tmp_path: Path) -> None:
    sae = replace(make_sae(torch.bfloat16), threshold=torch.rand(20))
    save_saelens(sae, tmp_path / "a", model_name="tiny")
    found = load_saelens(tmp_path / "a")
    assert {getattr(found, name).dtype for name in TENSORS} == {torch.float32}
    assert torch.equal(found.W_enc, sae.W_enc.float())
    assert torch.equal(found.threshold, sae.threshold)


def test_top_k_with_thresholds_is_no_architecture_of_saelens(tmp_path: Path) -> None:
    with pytest.raises(BankError) as error:
        save_saelens(replace(make_sae(), k=3), tmp_path / "a", model_name="tiny")
    assert error.value.field == "threshold"
    assert list(tmp_path.iterdir()) == []


def test_encoder_without_decoder_stays_marked(tmp_path: Path) -> None:
    sae = replace(make_sae(), encoder_only=True)
    save_saelens(sae, tmp_path / "a", model_name="tiny", metadata={"sailguard": {"source_format": "safe_sail"}})
    assert load_saelens(tmp_path / "a").encoder_only
    cfg = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert cfg["metadata"]["sailguard"] == {"source_format": "safe_sail", "encoder_only": True}


def write(folder: Path, tensors: dict[str, torch.Tensor], **cfg: Any) -> Path:
    """A folder as SAELens writes it."""
    metadata = {"sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12", "hook_name": samples.HOOK}
    base = {"d_in": 8, "d_sae": 24, "dtype": "float32", "device": "cpu", "normalize_activations": "none"}
    base |= {"apply_b_dec_to_input": True, "reshape_activations": "none", "metadata": metadata}
    samples.write_json(folder / CONFIG_FILE, {**base, **cfg})
    samples.write_safetensors(folder / WEIGHTS_FILE, tensors)
    return folder


def four(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = samples.gemma_tensors()
    del tensors["threshold"]
    return tensors | extra


def test_gated_sae_is_read_with_its_activations(tmp_path: Path) -> None:
    t = four(
        b_gate=samples.normal(24, seed=6), b_mag=samples.normal(24, seed=7), r_mag=samples.normal(24, seed=8) * 0.3
    )
    del t["b_enc"]
    sae = load_saelens(write(tmp_path / "a", t, architecture="gated"))
    x = samples.normal(50, 8)
    projection = (x - t["b_dec"]) @ t["W_enc"]
    expected = (projection + t["b_gate"] > 0) * torch.relu(projection * t["r_mag"].exp() + t["b_mag"])
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x), expected @ t["W_dec"] + t["b_dec"], atol=1e-4, rtol=1e-5)


def test_top_k_that_ranks_by_decoder_norm_is_read_with_its_activations(tmp_path: Path) -> None:
    t = four()
    t["W_dec"][3] = 0.0  # a feature that adds nothing must not turn into NaN
    sae = load_saelens(write(tmp_path / "a", t, architecture="topk", k=4, rescale_acts_by_decoder_norm=True))
    x = samples.normal(50, 8)
    norm = t["W_dec"].norm(dim=1)
    acts = samples.top_k(((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norm, 4)
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-5, rtol=1e-5)
    unit = t["W_dec"] / norm.clamp_min(1e-12)[:, None]
    torch.testing.assert_close(sae.reconstruct(x), acts @ unit + t["b_dec"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batch_top_k_checkpoint_is_read_with_its_running_threshold(tmp_path: Path, architecture: str) -> None:
    t = four(topk_threshold=torch.tensor(0.7, dtype=torch.double))
    cfg = {"architecture": architecture, "k": 4.5, "rescale_acts_by_decoder_norm": True}
    sae = load_saelens(write(tmp_path / "a", t, **cfg))
    x = samples.normal(50, 8)
    pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * t["W_dec"].norm(dim=1)
    torch.testing.assert_close(sae.encode(x), samples.jump(pre, 0.7), atol=1e-5, rtol=1e-5)
    assert (sae.k, sae.W_enc.dtype) == (None, torch.float32)


def test_negative_threshold_is_read_as_zero_where_saelens_cuts_as_well(tmp_path: Path) -> None:
    t = four(threshold=samples.normal(24, seed=9))
    sae = load_saelens(write(tmp_path / "a", t, architecture="jumprelu"))
    x = samples.normal(50, 8)
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    torch.testing.assert_close(sae.encode(x), torch.relu(pre) * (pre > t["threshold"]))


def test_threshold_may_be_stored_as_its_logarithm(tmp_path: Path) -> None:
    threshold = samples.positive(24) + 0.1
    sae = load_saelens(write(tmp_path / "a", four(log_threshold=threshold.log()), architecture="jumprelu"))
    torch.testing.assert_close(sae.threshold, threshold)


def test_scaled_activations_need_the_factor_and_then_it_is_folded_in(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "a",
        four(threshold=samples.positive(24)),
        architecture="jumprelu",
        normalize_activations="expected_average_only_in",
    )
    with pytest.raises(BankError, match="norm_factor") as error:
        load_saelens(folder)
    assert (error.value.file, error.value.field) == (str(folder / CONFIG_FILE), "normalize_activations")
    sae, t, x = load_sae(folder, norm_factor=2.5), load_file(folder / WEIGHTS_FILE), samples.normal(30, 8)
    acts = samples.jump((2.5 * x - t["b_dec"]) @ t["W_enc"] + t["b_enc"], t["threshold"])
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x), (acts @ t["W_dec"] + t["b_dec"]) / 2.5, atol=1e-5, rtol=1e-5)
    with pytest.raises(BankError) as error:
        load_sae(folder, norm_factor=-1.0)
    assert error.value.field == "norm_factor"


def write_old(folder: Path, tensors: dict[str, torch.Tensor], **cfg: Any) -> Path:
    """A folder from before SAELens 6: one flat configuration."""
    old = {"d_in": 8, "d_sae": 24, "dtype": "float32", "model_name": "tiny", "hook_name": samples.HOOK, "hook_layer": 2}
    samples.write_json(folder / CONFIG_FILE, {**old, "activation_fn_str": "relu", **cfg})
    samples.write_safetensors(folder / WEIGHTS_FILE, tensors)
    return folder


def test_old_configuration_is_read_with_the_defaults_of_its_time(tmp_path: Path) -> None:
    cfg = {"sae_lens_version": "5.10.0", "normalize_activations": False, "hook_point": samples.HOOK}
    source = read_source(write_old(tmp_path / "a", four(), **cfg))
    sae, t, x = source.sae, four(), samples.normal(30, 8)
    acts = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    torch.testing.assert_close(sae.encode(x), acts)
    assert (sae.hook_name, sae.apply_b_dec_to_input, source.model_name) == (samples.HOOK, True, "tiny")
    assert "before SAELens 6" in source.notes[0]


def test_old_top_k_and_scaling_are_read(tmp_path: Path) -> None:
    cfg = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "apply_b_dec_to_input": False}
    t = four(finetuning_scaling_factor=samples.positive(24, seed=9))
    sae = load_saelens(write_old(tmp_path / "a", t, finetuning_scaling_factor=True, **cfg))
    x = samples.normal(30, 8)
    acts = samples.top_k(x @ t["W_enc"] + t["b_enc"], 4)
    torch.testing.assert_close(sae.encode(x), acts)
    expected = (acts * t["finetuning_scaling_factor"]) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae.reconstruct(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "field"),
    [
        ({"normalize_activations": True}, "normalize_activations"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn"),
        ({"activation_fn_str": "topk"}, "k"),
        ({"hook_name": "blocks.2.attn.hook_z"}, "reshape_activations"),
        ({"hook_name": None}, "hook_name"),
        ({"architecture": "ghost"}, "architecture"),
    ],
)
def test_old_configuration_that_is_not_supported_is_refused(tmp_path: Path, cfg: dict[str, Any], field: str) -> None:
    folder = write_old(tmp_path / "a", four(), **cfg)
    with pytest.raises(BankError) as error:
        load_saelens(folder)
    assert (error.value.file, error.value.field) == (str(folder / CONFIG_FILE), field)


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("topk", lambda c: c.update(k=0), "k"),
        ("topk", lambda c: c.update(k=2.5), "k"),
        ("topk", lambda c: c.update(k=99), "k"),
        ("topk", lambda c: c.update(k="many"), "k"),
        ("relu skip transcoder", lambda c: c.update(d_out=9), "d_out"),
        ("relu skip transcoder", lambda c: c.update(apply_b_dec_to_input=True), "apply_b_dec_to_input"),
        ("relu skip transcoder", lambda c: c["metadata"].pop("hook_name_out"), "metadata.hook_name_out"),
    ],
)
def test_architecture_with_a_wrong_field_is_refused(
    tmp_path: Path, kind: str, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    save_saelens(samples.make_sae(kind), tmp_path / "a", model_name="tiny")
    edit_config(tmp_path / "a", change)
    with pytest.raises(BankError) as error:
        load_saelens(tmp_path / "a")
    assert (error.value.file, error.value.field) == (str(tmp_path / "a" / CONFIG_FILE), field)


def test_tensor_that_the_architecture_does_not_have_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update(W_skip=torch.zeros(8, 8)))
    with pytest.raises(BankError, match="not known") as error:
        load_saelens(folder)
    assert (error.value.file, error.value.field) == (str(folder / WEIGHTS_FILE), "W_skip")


def limit_files(limit: int) -> None:
    """The most bytes that this process may write to a file; -1 lifts the limit again."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("existed", [True, False])
def test_disk_that_fills_up_in_the_middle_leaves_the_former_folder(tmp_path: Path, existed: bool) -> None:
    old, folder = samples.make_sae("jumprelu"), tmp_path / "sae"
    if existed:
        save_saelens(old, folder, model_name="tiny")
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limit_files(1000)
    try:
        with pytest.raises(BankError, match="left as it was") as error:
            save_saelens(replace(old, W_enc=old.W_enc + 1), folder, model_name="tiny")
    finally:
        limit_files(-1)
    assert error.value.file == str(folder)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["sae"] if existed else [])


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_full_disk_at_the_last_moment_leaves_the_former_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(BankError, match="No space left on device"):
        save_saelens(samples.make_sae("topk"), folder, model_name="tiny")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
