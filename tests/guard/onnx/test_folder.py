"""What is altered, missing or of another bank is refused; a bank with other heads and the same rows is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_bank.bank import Bank, save_bank
from feature_bank.errors import MissingExtraError, SailguardError
from feature_bank.schema import Heads
from guard.engines.onnx import OnnxEngine
from guard.engines.onnx_export import export_onnx
from guard.engines.onnx_sidecar import BANK, GRAPHS, MANIFEST, TOKENIZER, Sidecar
from guard.errors import CanaryError, GuardError, PolicyError
from guard.metrics import Metrics
from tests.factories import make_bank, make_tiny_model
from tests.guard.conftest import VARIED
from tests.guard.onnx.conftest import POOLING, Start

FILES = (MANIFEST, TOKENIZER, GRAPHS["fp32"], *(f"{BANK}/{name}" for name in ("bank.json", "features.jsonl")))
ALL = (*FILES, f"{BANK}/heads.json", f"{BANK}/weights.safetensors")
TEXT = "Lanterns lined the quay."


def open_engine(folder: Path, **options: Any) -> OnnxEngine:
    return OnnxEngine.start(folder, precision="fp32", threads=1, **options)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("name", ALL)
def test_a_changed_byte_of_any_file_is_refused(copied: Path, name: str, data: st.DataObject) -> None:
    path = copied / name
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    changed = bytearray(before)
    changed[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        with pytest.raises(SailguardError):
            open_engine(copied)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_file_is_refused_by_name(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(SailguardError, match=Path(name).name):
        open_engine(copied)


def test_a_graph_that_is_not_used_need_not_be_there(copied: Path) -> None:
    (copied / GRAPHS["int8"]).unlink()
    open_engine(copied)
    with pytest.raises(GuardError, match=r"model\.int8\.onnx cannot be read"):
        OnnxEngine.start(copied)


def test_int8_is_taken_if_it_is_there_and_what_is_not_there_is_refused(exported: Path, tmp_path: Path) -> None:
    assert OnnxEngine.start(exported, threads=1).precision == "int8"
    with pytest.raises(GuardError, match=r"not exist|cannot be read|has no sidecar\.json"):
        OnnxEngine.start(tmp_path / "nowhere")


def test_reviews_of_the_bank_may_grow(copied: Path) -> None:
    with (copied / BANK / "reviews.jsonl").open("a") as file:
        file.write("\n")
    open_engine(copied)


def other_bank(bank: Bank, folder: Path, **changed: Any) -> Path:
    kept = {"schema_version", "files", "sha256"}
    heads = {d: head.model_copy(update={"bias": head.bias + 3.0}) for d, head in bank.heads.items()}
    parts: dict[str, Any] = {
        "manifest": {k: v for k, v in bank.manifest.model_dump().items() if k not in kept} | {"version": "2"},
        "features": bank.features,
        "heads": Heads(pooling=bank.pooling, heads=heads),  # type: ignore[arg-type]  # keys are domains
        "rows": bank.rows,
    }
    save_bank(folder, **{**parts, **changed})
    return folder


def test_a_bank_with_other_heads_is_used_without_a_new_export(exported: Path, bank: Bank, tmp_path: Path) -> None:
    before = open_engine(exported)
    after = before.reloaded(other_bank(bank, tmp_path / "other"), None)
    (plain,), (raised,) = before.score([TEXT], ["passage"]), after.score([TEXT], ["passage"])
    assert after.bank_version != before.bank_version
    assert all(raised.scores[d] > plain.scores[d] for d in plain.scores)
    assert open_engine(exported, bank=tmp_path / "other").score([TEXT], ["passage"]) == [raised]


def test_a_bank_with_other_features_asks_for_a_new_export(
    exported: Path, bank: Bank, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    make_bank(tmp_path / "rows", make_tiny_model(), tiny_tokenizer, fires=VARIED, pooling=POOLING, seed=1)
    scaled = [f.model_copy(update={"scale": f.scale * 2}) for f in bank.features]
    other_bank(bank, tmp_path / "scales", features=scaled)
    engine = open_engine(exported)
    for name, part in (("rows", "encoder rows"), ("scales", "scales")):
        with pytest.raises(GuardError, match=f"{part}.*export-onnx"):
            open_engine(exported, bank=tmp_path / name)
        with pytest.raises(GuardError, match=f"{part}.*export-onnx"):
            engine.reloaded(tmp_path / name, None)
    assert engine.score([TEXT], ["passage"])


def test_a_canary_that_does_not_come_out_is_refused(exported: Path, bank: Bank, tmp_path: Path) -> None:
    canary = bank.manifest.canary
    wrong = canary.model_copy(update={"activations": {k: v + 1.0 for k, v in canary.activations.items()}})
    manifest = bank.manifest.model_copy(update={"canary": wrong}).model_dump(
        exclude={"schema_version", "files", "sha256"}
    )
    other_bank(bank, tmp_path / "other", manifest=manifest)
    with pytest.raises(CanaryError, match="canary"):
        open_engine(exported, bank=tmp_path / "other")


def test_a_refused_reload_leaves_the_engine_as_it_was_and_a_good_one_changes_the_policy_alone(
    start: Start, tmp_path: Path
) -> None:
    engine = start()
    (before,) = engine.score([TEXT], ["prompt"])
    (tmp_path / "bad.yaml").write_text("rules: [{domain: gardening, action: flag}]")
    with pytest.raises(PolicyError):
        engine.reloaded(None, tmp_path / "bad.yaml")
    (tmp_path / "good.yaml").write_text("rules: [{domain: violence, action: block, threshold: {probability: 0.0001}}]")
    after = engine.reloaded(None, tmp_path / "good.yaml")
    (found,) = after.score([TEXT], ["prompt"])
    assert (after.bank_version, found.scores) == (engine.bank_version, before.scores)
    assert found.action == "block"
    assert engine.score([TEXT], ["prompt"]) == [before]
    assert after.policy_version != engine.policy_version
    after.close()
    assert engine.score([TEXT], ["prompt"]) == [before]


def test_an_export_that_was_replaced_is_read_again_with_its_bank(
    copied: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    engine = open_engine(copied)
    model = make_tiny_model()
    make_bank(tmp_path / "new", model, tiny_tokenizer, fires=VARIED, pooling=POOLING, seed=2)
    export_onnx(tmp_path / "new", copied, model, tiny_tokenizer, precisions=["fp32"])
    assert engine.reloaded(None, None).bank_version == engine.bank_version
    after = engine.reloaded(copied / BANK, None)
    assert after.bank_version == Bank.load(tmp_path / "new").version != engine.bank_version
    assert set(Sidecar.load(copied).graphs) == {"fp32"}
    assert not (copied / GRAPHS["int8"]).exists()


def test_the_versions_in_use_are_published(exported: Path, bank: Bank) -> None:
    metrics = Metrics()
    engine = open_engine(exported, metrics=metrics)
    page = metrics.render().decode()
    assert engine.metrics is metrics
    assert f'content_hash="{bank.content_hash[:12]}"' in page
    assert f'version="{engine.policy_version}"' in page
    assert (engine.model_id, engine.generates, engine.context_length) == ("tiny-llama", False, 512)


def test_an_export_replaces_nothing_that_is_no_export(
    exported: Path, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear reader")
    with pytest.raises(GuardError, match="was not written by export-onnx"):
        export_onnx(exported / BANK, tmp_path / "mine", tiny_model, tiny_tokenizer)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_an_export_that_fails_leaves_the_one_before_it_and_the_model_as_they_were(
    copied: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("torch.onnx.export", fail)
    layers = tiny_model.model.layers
    with pytest.raises(GuardError, match="cannot be exported: out of luck"):
        export_onnx(copied / BANK, copied, tiny_model, tiny_tokenizer)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert list(copied.parent.iterdir()) == [copied]
    assert tiny_model.model.layers is layers
    assert len(layers) == 4


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_an_export_without_its_extra_names_it(
    exported: Path, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    with pytest.raises(MissingExtraError, match=r"sailguard\[onnx-export\]"):
        export_onnx(exported / BANK, tmp_path / "out", tiny_model, tiny_tokenizer)
    assert not (tmp_path / "out").exists()


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "accelerate", "jinja2", "jaxtyping", "onnx", "onnxscript"}:
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
from pathlib import Path
from guard.engines.onnx import OnnxEngine

engine = OnnxEngine.start(Path(sys.argv[1]))
score, = engine.score(["Lanterns lined the quay."], ["prompt"])
trace = engine.trace("A quiet evening.", "response")
stream = engine.open_response()
released = stream.push("The ferry came in late and left early.", last=True)
assert not {"torch", "transformers"} & set(sys.modules)
print(score.tokens, len(trace.tokens), stream.report().tokens_observed > 0, engine.reloaded(None, None).bank_version)
"""


def test_the_engine_runs_where_there_is_no_torch(exported: Path, bank: Bank) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(exported)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["24", "16", "True", bank.version]


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_an_engine_without_its_extra_names_it(exported: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*sailguard\[sidecar\]"):
        open_engine(exported)


def test_a_copy_elsewhere_works_as_well(exported: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exported, tmp_path / "a b" / "moved"))
    assert open_engine(moved).score([TEXT], ["prompt"]) == open_engine(exported).score([TEXT], ["prompt"])
