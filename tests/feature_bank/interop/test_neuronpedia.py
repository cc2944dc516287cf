"""What Neuronpedia's layout can hold survives the way out and back in; what it cannot is on the list."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_bank.bank import Bank
from feature_bank.errors import BankError
from feature_bank.interop.collection import Collection, save_collection
from feature_bank.interop.neuronpedia import (
    ACTIVATION_COLUMNS,
    EXPLANATION_COLUMNS,
    FEATURE_COLUMNS,
    layer_of,
    slug,
    write_lines,
)
from feature_bank.interop.neuronpedia_export import export_neuronpedia
from feature_bank.interop.neuronpedia_import import read_neuronpedia
from feature_bank.interop.neuronpedia_losses import EXPORTED, LOST
from feature_bank.schema import Causality, Evidence, Explainer, FeatureRecord
from tests.factories import HOOKS, PER_HOOK, make_bank

SOURCES = ("1-sailguard-res-128", "3-sailguard-res-128")
TOKENS = ["A", " bird", " sang"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, module_model: Any) -> Bank:
    """A bank of which every third feature has all that the layout can hold."""
    plain = make_bank(tmp_path_factory.mktemp("bank") / "bank", module_model, tiny_tokenizer)
    features = []
    for i, feature in enumerate(plain.features):
        if i % 3 == 0:
            activations = [0.0, 0.1 + i / 7, 0.2]
            height = max(activations)
            evidence = Evidence(
                text="".join(TOKENS),
                peak=TOKENS[activations.index(height)],
                activation=height,
                tokens=TOKENS,
                activations=activations,
            )
            feature = feature.model_copy(
                update={
                    "explainer": Explainer(method="llm" if i % 2 else "executable", model="tiny" if i % 2 else None),
                    "histogram": list(range(20)),
                    "evidence": [evidence, evidence.model_copy(update={"activations": [0.3, 0.0, 0.0]})],
                }
            )
        features.append(feature)
    return replace(plain, features=tuple(features))


@pytest.fixture(scope="module")
def module_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=260, **size)).eval().requires_grad_(False)


def rows_of(folder: Path, source: str, table: str, model: str = "tiny-llama") -> list[dict[str, Any]]:
    found = []
    for path in sorted((folder / model / source / table).iterdir()):
        found += [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return found


def write_source(folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]], *, packed: bool = True) -> Path:
    """A source's folder as another tool writes it."""
    for table, rows in tables.items():
        write_lines(folder / table / ("batch-0.jsonl.gz" if packed else "batch-0.jsonl"), rows)
    return folder


def naming(index: Any = "7", source: str = "5-res-x") -> dict[str, Any]:
    return {"modelId": "tiny", "layer": source, "index": index}


def test_every_field_of_a_feature_has_a_place_there_or_a_reason_why_not() -> None:
    assert set(FeatureRecord.model_fields) == EXPORTED | set(LOST)
    assert EXPORTED.isdisjoint(LOST)


def test_what_the_layout_can_hold_comes_back(tmp_path: Path, bank: Bank) -> None:
    export_neuronpedia(bank, tmp_path / "out")
    found = read_neuronpedia(tmp_path / "out")
    assert (found.model, len(found.features)) == ("tiny-llama", len(bank.features))
    for feature in bank.features:
        back = found.by_id[feature.id]
        assert (back.layer, back.index, back.hook_name) == (feature.layer, feature.index, feature.hook_name)
        (explanation,) = back.explanations
        assert explanation.text == feature.explanation
        explainer = feature.explainer
        assert explanation.kind == (explainer and f"sailguard_{explainer.method}")
        assert explanation.model == (explainer and explainer.model)
        assert back.density == feature.density
        assert [e.tokens for e in back.examples] == [e.tokens for e in feature.evidence]
        assert [e.activations for e in back.examples] == [
            [a * feature.scale for a in e.activations] for e in feature.evidence
        ]
        heights = [a for e in feature.evidence for a in e.activations]
        assert back.max_activation == (max(heights) * feature.scale if heights else None)
        if feature.histogram:
            assert back.histogram is not None
            assert back.histogram.heights == feature.histogram
            assert back.histogram.values[0] * 40 == pytest.approx(feature.scale)
        hook = [f for f in bank.features if f.hook_name == feature.hook_name]
        row = bank.rows[feature.hook_name].W_dec[hook.index(feature)]
        assert np.array_equal(np.array(back.vector, dtype=np.float32), row)


def test_a_second_round_changes_nothing(tmp_path: Path, bank: Bank) -> None:
    first, second = (export_neuronpedia(bank, tmp_path / name) for name in ("a", "b"))
    files = [sorted(p.relative_to(e.folder) for p in e.folder.rglob("*") if p.is_file()) for e in (first, second)]
    assert files[0] == files[1]
    assert all((first.folder / p).read_bytes() == (second.folder / p).read_bytes() for p in files[0])
    found = read_neuronpedia(first.folder)
    assert save_collection(tmp_path / "collection", found, tool_version="0") == found


def test_folders_and_columns_are_those_of_the_published_exports(tmp_path: Path, bank: Bank) -> None:
    exported = export_neuronpedia(bank, tmp_path / "out")
    assert exported.sources == SOURCES
    assert [layer_of(source) for source in SOURCES] == [1, 3]
    columns = {
        "features": FEATURE_COLUMNS,
        "activations": ACTIVATION_COLUMNS,
        "explanations": EXPLANATION_COLUMNS,
    }
    for source in SOURCES:
        folder = tmp_path / "out" / "tiny-llama" / source
        assert {p.name for p in folder.glob("*.jsonl")} == {
            "model.jsonl",
            "release.jsonl",
            "source.jsonl",
            "sourceset.jsonl",
        }
        for table, names in columns.items():
            rows = rows_of(tmp_path / "out", source, table)
            assert all(list(row) == list(names) for row in rows)  # the first row's columns count for all there
            assert all(isinstance(row["index"], str) for row in rows)
        described = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.jsonl")}
        assert described["source"]["setName"] == described["sourceset"]["name"] == source.split("-", 1)[1]
        assert described["sourceset"]["releaseName"] == described["release"]["name"]
        assert described["model"]["layers"] == bank.manifest.model.n_layers
    kinds = (tmp_path / "out" / "config" / "explanation_type.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in kinds] == ["sailguard_executable", "sailguard_llm"]
    assert exported.features == len(HOOKS) * PER_HOOK == exported.explanations
    assert exported.activations == sum(len(f.evidence) for f in bank.features)


def test_an_activation_names_its_peak(tmp_path: Path, bank: Bank) -> None:
    export_neuronpedia(bank, tmp_path / "out")
    rows = rows_of(tmp_path / "out", SOURCES[0], "activations")
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
        assert len(row["id"]) == 25


def test_many_features_are_batched_in_order(tmp_path: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_bank.interop.neuronpedia_export.BATCH", 1)
    export_neuronpedia(bank, tmp_path / "out")
    folder = tmp_path / "out" / "tiny-llama" / SOURCES[0]
    assert len(list((folder / "features").iterdir())) == PER_HOOK
    # Files without a row are not written: the importer there fails on them
    assert len(list((folder / "activations").iterdir())) == PER_HOOK / 3
    names = [file.name for file in read_neuronpedia(folder).files if file.name.startswith("features/")]
    assert names == [f"features/batch-{i}.jsonl.gz" for i in range(PER_HOOK)]


def test_losses_count_what_is_there_and_nothing_else(tmp_path: Path, bank: Bank) -> None:
    bare = {loss.field: loss.count for loss in export_neuronpedia(bank, tmp_path / "a").losses}
    n = len(bank.features)
    assert {k: v for k, v in bare.items() if not k.startswith("bank.")} == {
        "domains": n,
        "threshold": n,
        "scale": n,
        "evidence": n / 3,
    }
    assert {k for k in bare if k.startswith("bank.")} == {
        *("bank.heads", "bank.weights", "bank.canary", "bank.corpora", "bank.hook_points", "bank.identity")
    }
    causality = Causality(texts=3, effects={"politics": -1.0}, low={"politics": -2.0}, high={"politics": 0.0})
    excerpt = Evidence(text="a bird", peak="bird", activation=1.0)
    changed = bank.features[1].model_copy(
        update={"causality": causality, "admitted": False, "promoted_tokens": ["bird"], "evidence": [excerpt]}
    )
    richer = replace(bank, features=(bank.features[0], changed, *bank.features[2:]))
    losses = export_neuronpedia(richer, tmp_path / "b", reviews=2).losses
    more = {loss.field: loss.count for loss in losses if loss.field != "evidence"}
    assert {k: more[k] for k in more.keys() - bare.keys()} == {
        "causality": 1,
        "admitted": 1,
        "promoted_tokens": 1,
        "bank.reviews": 2,
    }
    assert [loss.count for loss in losses if loss.field == "evidence"] == [1, n / 3]
    assert all(loss.reason for loss in losses)


def test_a_bank_without_decoders_exports_no_vectors(tmp_path: Path, bank: Bank) -> None:
    rows = {name: replace(part, W_dec=np.zeros_like(part.W_dec)) for name, part in bank.rows.items()}
    export_neuronpedia(replace(bank, rows=rows), tmp_path / "out")
    assert all(not f.vector for f in read_neuronpedia(tmp_path / "out").features)
    assert not any(row["hasVector"] for row in rows_of(tmp_path / "out", SOURCES[0], "features"))


@pytest.mark.parametrize("field", ["model_id", "set_name"])
@pytest.mark.parametrize("name", ["", "a/b", "..", "A", "a b"])
def test_names_that_cannot_be_ids_there_are_refused(tmp_path: Path, bank: Bank, field: str, name: str) -> None:
    with pytest.raises(BankError) as error:
        export_neuronpedia(bank, tmp_path / "out", **{field: name})  # type: ignore[arg-type]
    assert error.value.field == field
    assert not (tmp_path / "out").exists()


def test_a_models_name_becomes_an_id() -> None:
    assert slug("HuggingFaceTB/SmolLM2-135M.Instruct") == "huggingfacetb-smollm2-135m-instruct"
    assert [layer_of(s) for s in ("20-gemmascope-res-16k", "6", "e-res-sm", "x", "20res")] == [20, 6, None, None, None]


THEIRS: dict[str, list[dict[str, Any]]] = {
    "features": [
        {
            **FEATURE_COLUMNS,
            **naming(7),  # SAEDashboard's converter writes numbers
            "maxActApprox": 31.5,
            "frac_nonzero": 0.0123,
            "pos_str": [" bird", " wing"],
            "pos_values": [0.9, 0.8],
            "neg_str": [" the"],
            "neg_values": [-0.4],
            "freq_hist_data_bar_values": [1.5, 4.5],
            "freq_hist_data_bar_heights": [10, 2],
            "logits_hist_data_bar_values": [-1.0, 1.0],
            "logits_hist_data_bar_heights": [3, 4],
            "correlated_neurons_indices": [4, 5],
            "topkCosSimIndices": [1],
            "createdAt": "2025-01-01T00:00:00",
            "creatorId": "c1",
        },
        {**FEATURE_COLUMNS, **naming("12")},
    ],
    "activations": [
        {
            **ACTIVATION_COLUMNS,
            **naming(),
            "tokens": TOKENS,
            "values": [0, 31.5, 2],
            "binMin": -1,
            "binMax": 31.5,
            "binContains": -1,
            "dfaValues": [0.5],
            "qualifyingTokenIndex": 1,
        }
    ],
    "explanations": [
        {**EXPLANATION_COLUMNS, **naming(), "description": "birds", "typeName": "np_max-act", "umap_x": 3.5},
        {**EXPLANATION_COLUMNS, **naming(), "description": "flight", "explanationModelName": "tiny"},
    ],
    "explanations-tiny": [{**EXPLANATION_COLUMNS, **naming("30"), "description": "rivers"}],
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("level", ["source", "model", "export"])
def test_an_export_of_theirs_is_read_whole_and_its_losses_are_listed(tmp_path: Path, packed: bool, level: str) -> None:
    source = write_source(tmp_path / "v1" / "tiny" / "5-res-x", THEIRS, packed=packed)
    write_lines(source / "model.jsonl", [{"id": "tiny"}])
    write_lines(tmp_path / "v1" / "config" / "explanation_type.jsonl", [{"name": "np_max-act"}])
    folder = {"source": source, "model": source.parent, "export": tmp_path / "v1"}[level]
    found = read_neuronpedia(folder)
    assert [f.id for f in found.features] == ["L5/7", "L5/12", "L5/30"]
    first, second, third = found.features
    assert [(e.text, e.kind, e.model) for e in first.explanations] == [
        ("birds", "np_max-act", None),
        ("flight", None, "tiny"),
    ]
    assert (first.density, first.max_activation) == (0.0123, 31.5)
    assert (first.promoted_tokens, first.suppressed_logits) == ([" bird", " wing"], [-0.4])
    assert first.histogram is not None
    assert first.logit_histogram is not None
    assert (first.histogram.heights, first.logit_histogram.values) == ([10, 2], [-1.0, 1.0])
    (example,) = first.examples
    assert (example.tokens, example.activations, example.bin_max) == (TOKENS, [0, 31.5, 2], 31.5)
    assert (second.explanations, second.examples, second.histogram) == ([], [], None)
    assert (third.explanation, third.density) == ("rivers", None)
    losses = {loss.field: loss.count for loss in found.losses}
    assert losses == {
        "features.correlated_neurons_indices": 1,
        "features.topkCosSimIndices": 1,
        "features.createdAt": 1,
        "features.creatorId": 1,
        "activations.dfaValues": 1,
        "activations.qualifyingTokenIndex": 1,
        "explanations.umap_x": 1,
        "model.jsonl": 1,
    }


def dashboard_batch(**changes: Any) -> dict[str, Any]:
    activation = {"bin_min": -1, "bin_max": 2.0, "bin_contains": -1, "tokens": TOKENS, "values": [0.0, 2.0, 0.0]}
    feature = {
        "feature_index": 3,
        "frac_nonzero": 0.01,
        "pos_str": [" bird"],
        "pos_values": [1.0],
        "n_prompts_total": 10,
        "activations": [activation],
    }
    return {"model_id": "tiny", "layer": 2, "sae_set": "res-x", "features": [{**feature, **changes}]}


def test_batches_of_saedashboard_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "batch-0.json").write_text(json.dumps(dashboard_batch()))
    found: Collection = read_neuronpedia(tmp_path)
    (feature,) = found.features
    assert (found.model, feature.id, feature.promoted_tokens) == ("tiny", "L2/3", [" bird"])
    assert (feature.max_activation, feature.examples[0].bin_max) == (2.0, 2.0)
    assert {loss.field: loss.count for loss in found.losses} == {"features.n_prompts_total": 1}


FEATURE, ACTIVATION, EXPLANATION = (THEIRS[name][0] for name in ("features", "activations", "explanations"))


@pytest.mark.parametrize(
    ("table", "rows", "field"),
    [
        ("features", [{**FEATURE, "index": "x"}], "index"),
        ("features", [{**FEATURE, "index": None}], "index"),
        ("features", [{**FEATURE, "index": -1}], "index"),
        ("features", [{**FEATURE, "layer": "6-res-x"}], "layer"),
        ("features", [{**FEATURE, "modelId": None}], "modelId"),
        ("features", [FEATURE, FEATURE], "index"),
        ("features", [{**FEATURE, "frac_nonzero": 1.5}], "frac_nonzero"),
        ("features", [{**FEATURE, "pos_str": "bird"}], "pos_str"),
        ("features", [{**FEATURE, "pos_values": [1.0]}], None),
        ("features", [{**FEATURE, "freq_hist_data_bar_heights": [1]}], None),
        ("activations", [{**ACTIVATION, "values": [1.0]}], None),
        ("activations", [{**ACTIVATION, "tokens": [], "values": []}], "tokens"),
        ("explanations", [{**EXPLANATION, "description": None}], "description"),
    ],
)
def test_malformed_rows_are_refused_with_file_and_line(
    tmp_path: Path, table: str, rows: list[dict[str, Any]], field: str | None
) -> None:
    write_source(tmp_path / "5-res-x", {table: rows})
    with pytest.raises(BankError) as error:
        read_neuronpedia(tmp_path / "5-res-x")
    assert f"batch-0.jsonl.gz:{len(rows)}" in str(error.value.file)
    assert error.value.field == field


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"modelId": NaN}', '{"modelId": "\\ud800"}'])
def test_lines_that_are_no_rows_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "batch-0.jsonl").write_text(line + "\n")
    with pytest.raises(BankError) as error:
        read_neuronpedia(tmp_path)
    assert str(error.value.file).endswith("batch-0.jsonl:1")


def test_what_cannot_be_one_collection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="no folder"):
        read_neuronpedia(tmp_path / "nowhere")
    with pytest.raises(BankError, match="no export"):
        read_neuronpedia(tmp_path)
    half = write_source(tmp_path / "a" / "5-res-x", THEIRS) / "features" / "batch-0.jsonl.gz"
    half.write_bytes(half.read_bytes()[:-9])
    with pytest.raises(BankError, match="half-written"):
        read_neuronpedia(tmp_path / "a")
    for name in ("5-res-x", "5-mlp-x"):
        write_source(tmp_path / "b" / name, {"features": [{**FEATURE, "layer": name}]})
    with pytest.raises(BankError, match="one source of a layer"):
        read_neuronpedia(tmp_path / "b")
    write_source(tmp_path / "c" / "e-res-x", {"features": [{**FEATURE, "layer": "e-res-x"}]})
    with pytest.raises(BankError, match="names no layer"):
        read_neuronpedia(tmp_path / "c")
    for model in ("one", "two"):
        source = "5-res-x" if model == "one" else "6-res-x"
        write_source(tmp_path / "d" / model / source, {"features": [{**FEATURE, "modelId": model, "layer": source}]})
    with pytest.raises(BankError, match="several models: one, two"):
        read_neuronpedia(tmp_path / "d")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "batch-0.json").write_text(json.dumps(dashboard_batch(activations=[{"tokens": ["a"]}])))
    with pytest.raises(BankError) as error:
        read_neuronpedia(tmp_path / "e")
    assert error.value.field == "values"
