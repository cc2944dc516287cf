"""A file or folder is recognised by its names, and read without being told what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_bank.errors import BankError
from feature_bank.formats import FORMATS, SourceOptions, detect, load_sae, read_source
from feature_bank.formats.saelens import save_saelens
from tests.feature_bank.formats import samples


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, list[Path]]:
    """Of each format, the paths by which its SAE can be named."""
    save_saelens(samples.make_sae("jumprelu"), tmp_path / "saelens", model_name="tiny")
    sparsify = samples.make_sparsify(tmp_path / "run" / "layers.2")
    dictionary = samples.make_dictionary(tmp_path / "dictionary", "JumpReluAutoEncoder", samples.gemma_tensors())
    npz = samples.write_npz(
        tmp_path / "gemma-scope-2b-pt-res" / "layer_2" / "x" / "params.npz", samples.gemma_tensors()
    )
    lower = samples.gemma_tensors(upper=False)
    second = samples.write_safetensors(tmp_path / "resid_post" / "layer_2_width_16k" / "params.safetensors", lower)
    qwen = samples.write_torch(tmp_path / "SAE-Res-X-W1K-L0_5" / "layer2.sae.pt", samples.qwen_tensors())
    llama = samples.make_llama(tmp_path / "llama")
    sail = samples.write_torch(tmp_path / "sail" / "ckpt_layer2.pt", samples.safe_sail_tensors(1, theta=True))
    return {
        "saelens": [tmp_path / "saelens", tmp_path / "saelens" / "sae_weights.safetensors"],
        "sparsify": [sparsify, sparsify / "sae.safetensors"],
        "dictionary_learning": [dictionary, dictionary / "ae.pt"],
        "gemma_scope": [npz, npz.parent, second, second.parent],
        "qwen_scope": [qwen, qwen.parent],
        "llama_scope": [llama, llama / "sae_weights.safetensors"],
        "safe_sail": [sail, sail.parent],
    }


def test_every_format_is_recognised_and_read(sources: dict[str, list[Path]]) -> None:
    assert set(sources) == set(FORMATS)
    for name, paths in sources.items():
        for path in paths:
            assert detect(path) == name
            source = read_source(path)
            assert (source.format, source.sae.d_in, source.sae.d_sae) == (name, samples.D_IN, samples.D_SAE)
            assert source.weights.is_file()
            assert source.sae.hook_name.startswith("blocks.2.")


def test_a_format_that_is_named_is_taken_at_its_word(sources: dict[str, list[Path]]) -> None:
    qwen = sources["qwen_scope"][0]
    moved = qwen.rename(qwen.parent / "mine.pt")
    with pytest.raises(BankError, match="name it") as error:
        detect(moved)
    assert (error.value.file, error.value.field) == (str(moved), "format")
    sae = load_sae(moved, format="qwen_scope", hook_name="blocks.1.hook_resid_post")
    assert (sae.k, sae.hook_name) == (5, "blocks.1.hook_resid_post")
    with pytest.raises(BankError, match="known are saelens") as error:
        load_sae(moved, format="ghost")
    assert error.value.field == "format"


def test_hook_point_and_model_that_are_given_win(sources: dict[str, list[Path]]) -> None:
    options = SourceOptions(hook_name="blocks.9.hook_resid_pre", model_name="mine")
    for paths in sources.values():
        source = read_source(paths[0], options)
        assert (source.sae.hook_name, source.model_name) == ("blocks.9.hook_resid_pre", "mine")


@pytest.mark.parametrize("option", ["k", "index", "norm_factor", "hook_name_out"])
def test_option_that_a_format_does_not_take_is_refused(sources: dict[str, list[Path]], option: str) -> None:
    for name, paths in sources.items():
        if option in FORMATS[name].options:
            continue
        with pytest.raises(BankError, match="no use") as error:
            load_sae(paths[0], **{option: 1})
        assert error.value.field == option


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_what_does_not_exist_is_refused_by_name(tmp_path: Path, name: str | None) -> None:
    with pytest.raises(BankError) as error:
        load_sae(tmp_path / "absent", format=name)
    assert error.value.file == str(tmp_path / "absent")


@pytest.mark.parametrize("name", FORMATS)
def test_empty_folder_is_refused_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    with pytest.raises(BankError) as error:
        load_sae(tmp_path, format=name)
    assert str(error.value.file).startswith(str(tmp_path))


def test_folder_of_something_else_is_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(BankError) as error:
        detect(tmp_path)
    assert error.value.field == "format"
