"""SAELens folders: what is written is read back to the bit, and what cannot be read is refused by file and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from feature_bank.errors import BankError
from feature_bank.formats.saelens import CONFIG_FILE, WEIGHTS_FILE, load_saelens, save_saelens
from feature_bank.sae import SAE

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
        (lambda c: c.update(architecture="gated"), "architecture"),
        (lambda c: c.pop("architecture"), "architecture"),
        (lambda c: c.update(normalize_activations="layer_norm"), "normalize_activations"),
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
