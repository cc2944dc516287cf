"""Files that are damaged, hostile or of the wrong kind: one error that names the file, never another exception."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_bank.errors import BankError
from feature_bank.formats import load_sae
from feature_bank.formats.saelens import save_saelens
from tests.feature_bank.formats import samples

Make = Callable[[Path, dict[str, Any]], Path]


def _torch(name: str) -> Make:
    return lambda folder, tensors: samples.write_torch(folder / name, tensors)


def _dictionary(folder: Path, tensors: dict[str, Any]) -> Path:
    samples.make_dictionary(folder, "JumpReluAutoEncoder", {})
    return samples.write_torch(folder / "ae.pt", tensors)


def _sparsify(folder: Path, tensors: dict[str, Any]) -> Path:
    samples.make_sparsify(folder / "layers.2")
    return samples.write_safetensors(folder / "layers.2" / "sae.safetensors", tensors)


def _llama(folder: Path, tensors: dict[str, Any]) -> Path:
    samples.make_llama(folder, {}, act_fn="relu", norm_activation="inference")
    return samples.write_safetensors(folder / "sae_weights.safetensors", tensors)


def _saelens(folder: Path, tensors: dict[str, Any]) -> Path:
    save_saelens(samples.make_sae("jumprelu"), folder, model_name="tiny")
    return samples.write_safetensors(folder / "sae_weights.safetensors", tensors)


def _gemma(folder: Path, tensors: dict[str, Any]) -> Path:
    return samples.write_npz(folder / "resid_post" / "layer_2" / "params.npz", tensors)


# Per format: how to write its file, its tensors, and one of them.
FORMATS: dict[str, tuple[Make, dict[str, torch.Tensor], str]] = {
    "saelens": (_saelens, samples.gemma_tensors(), "b_dec"),
    "sparsify": (_sparsify, samples.sparsify_tensors(), "W_dec"),
    "dictionary_learning": (_dictionary, samples.gemma_tensors(), "W_dec"),
    "gemma_scope": (_gemma, samples.gemma_tensors(), "threshold"),
    "qwen_scope": (_torch("SAE-Res-X-W1K-L0_5-layer2/layer2.sae.pt"), samples.qwen_tensors(), "b_enc"),
    "llama_scope": (_llama, samples.llama_tensors(), "W_D"),
    "safe_sail": (_torch("ckpt_layer2.pt"), samples.safe_sail_tensors(1, theta=True), "encoder.bias"),
}
TORCH = ("dictionary_learning", "qwen_scope", "safe_sail")


@pytest.mark.parametrize("name", FORMATS)
def test_the_sound_file_is_read(tmp_path: Path, name: str) -> None:
    make, tensors, _ = FORMATS[name]
    assert load_sae(make(tmp_path, tensors)).d_sae == samples.D_SAE


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "missing"),
        (lambda t: t[..., :-1].clone(), "shape"),
        (lambda t: t[None].clone(), "shape"),
        (lambda t: torch.full_like(t, float("nan")), "NaN"),
        (lambda t: torch.full_like(t, float("inf")), "infinity"),
        (lambda t: t.long(), "floating point"),
    ],
)
def test_tensor_that_is_wrong_is_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str
) -> None:
    make, tensors, field = FORMATS[name]
    changed = change(tensors[field])
    tensors = {key: value for key, value in tensors.items() if key != field}
    file = make(tmp_path, tensors if changed is None else tensors | {field: changed})
    with pytest.raises(BankError, match=message) as error:
        load_sae(file)
    assert (error.value.file, error.value.field) == (str(file), field)


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_that_is_not_of_the_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make, tensors, _ = FORMATS[name]
    file = make(tmp_path, tensors | {"extra": torch.ones(2)})
    with pytest.raises(BankError, match="not known") as error:
        load_sae(file)
    assert (error.value.file, error.value.field) == (str(file), "extra")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", [0, 1, 9, 0.3, 0.6, 0.95])
def test_half_written_file_is_refused_by_name(tmp_path: Path, name: str, kept: float) -> None:
    make, tensors, _ = FORMATS[name]
    file = make(tmp_path, tensors)
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(BankError) as error:
        load_sae(file)
    assert error.value.file == str(file)


def blamed(file: Path) -> str | None:
    """The file that the error names; None if there was none."""
    try:
        load_sae(file)
    except BankError as error:
        return error.file or "no file"
    return None


@pytest.mark.parametrize("name", FORMATS)
def test_damage_anywhere_is_refused_or_harmless_but_never_another_error(tmp_path: Path, name: str) -> None:
    make, tensors, _ = FORMATS[name]
    file = make(tmp_path, tensors)
    content = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for at in generator.integers(0, len(content), 6):
            damaged[at] ^= int(generator.integers(1, 256))
        file.write_bytes(bytes(damaged))
        assert blamed(file) in (None, str(file))


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", TORCH)
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path: Path, name: str, archive: bool) -> None:
    make, tensors, field = FORMATS[name]
    payload = Payload(tmp_path / "ran")
    file = make(tmp_path, {**tensors, field: payload} if archive else tensors)
    if not archive:
        file.write_bytes(pickle.dumps({**tensors, field: payload}))
    with pytest.raises(BankError, match="was not run and is refused") as error:
        load_sae(file)
    assert error.value.file == str(file)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_numpy_archive_is_refused_and_never_runs(tmp_path: Path) -> None:
    file = _gemma(tmp_path, samples.gemma_tensors())
    arrays = {name: t.numpy() for name, t in samples.gemma_tensors().items()}
    arrays["threshold"] = np.array([Payload(tmp_path / "ran")], dtype=object)
    np.savez(file, **arrays)
    with pytest.raises(BankError) as error:
        load_sae(file)
    assert error.value.file == str(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), "text"])
def test_archive_that_holds_no_tensors_by_name_is_refused(tmp_path: Path, name: str, content: Any) -> None:
    make, tensors, _ = FORMATS[name]
    file = make(tmp_path, tensors)
    torch.save(content, file)
    with pytest.raises(BankError, match="not tensors by name") as error:
        load_sae(file)
    assert error.value.file == str(file)


@pytest.mark.parametrize("name", TORCH)
def test_value_that_is_no_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make, tensors, field = FORMATS[name]
    file = make(tmp_path, {**tensors, field: 3})
    with pytest.raises(BankError, match="no tensor") as error:
        load_sae(file)
    assert (error.value.file, error.value.field) == (str(file), field)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize(
    ("make", "config"), [(_sparsify, "cfg.json"), (_dictionary, "config.json"), (_llama, "config.json")]
)
def test_configuration_that_is_not_a_json_object_is_refused(
    tmp_path: Path, make: Make, config: str, content: bytes
) -> None:
    file = make(tmp_path, samples.llama_tensors())
    (file.parent / config).write_bytes(content)
    with pytest.raises(BankError) as error:
        load_sae(file.parent)
    assert error.value.file == str(file.parent / config)


@pytest.mark.parametrize(("make", "config"), [(_sparsify, "cfg.json"), (_dictionary, "config.json")])
def test_missing_configuration_is_refused_with_what_a_folder_holds(tmp_path: Path, make: Make, config: str) -> None:
    file = make(tmp_path, samples.sparsify_tensors())
    (file.parent / config).unlink()
    with pytest.raises(BankError, match="folder holds") as error:
        load_sae(file.parent)
    assert error.value.file == str(file.parent / config)
