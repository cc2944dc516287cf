"""A sweep's file says which SAEs there will be, or by field what is wrong with it; what comes out stands in a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from feature_bank.errors import DataError
from feature_bank.formats.saelens import load_saelens
from feature_bank.identity import identify
from training.cache import open_harvest
from training.pipeline import load_preset
from training.sweep import PREFIX, Sweep, load_sweep, rows, train_cached, train_sweep

HOOKS = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
SWEEP: dict[str, Any] = {
    "hook_points": list(HOOKS),
    "max_tokens": 60,
    "batch_tokens": 64,
    "epochs": 2,
    "saes": [
        {"architecture": "batch_topk", "expansion": 2, "options": {"k": 4}, "sweep": {"k": [2, 4], "seed": [0, 1]}},
        {"architecture": "topk", "expansion": 2, "options": {"k": 4}, "hook_points": [HOOKS[1]], "lr": 1e-2},
        {
            "architecture": "skip_transcoder",
            "d_sae": 40,
            "options": {"k": 4},
            "hook_points": [HOOKS[0]],
            "hook_points_out": ["blocks.1.hook_mlp_out"],
        },
    ],
}
NAMES = [
    f"{HOOKS[0]}/batch_topk-k2-seed0",
    f"{HOOKS[0]}/batch_topk-k2-seed1",
    f"{HOOKS[0]}/batch_topk-k4-seed0",
    f"{HOOKS[0]}/batch_topk-k4-seed1",
    f"{HOOKS[0]}/skip_transcoder-k4-seed0",
    f"{HOOKS[1]}/batch_topk-k2-seed0",
    f"{HOOKS[1]}/batch_topk-k2-seed1",
    f"{HOOKS[1]}/batch_topk-k4-seed0",
    f"{HOOKS[1]}/batch_topk-k4-seed1",
    f"{HOOKS[1]}/topk-k4-seed0",
]


def write(folder: Path, content: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


def with_group(**fields: Any) -> dict[str, Any]:
    return {**SWEEP, "saes": [SWEEP["saes"][0], {"architecture": "topk", **fields}]}


# ---- the file ------------------------------------------------------------------------------------


def test_every_combination_is_one_sae(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, SWEEP))
    runs = sweep.runs()
    assert [run.name for run in runs] == NAMES
    assert sweep.all_hook_points == (*HOOKS, "blocks.1.hook_mlp_out")
    by_name = {run.name: run for run in runs}
    transcoder = by_name[NAMES[4]]
    assert (transcoder.hook_name_out, transcoder.config.d_sae) == ("blocks.1.hook_mlp_out", 40)
    assert [by_name[NAMES[i]].config.options["k"] for i in range(4)] == [2, 2, 4, 4]
    assert [by_name[NAMES[i]].config.seed for i in range(4)] == [0, 1, 0, 1]
    assert (by_name[NAMES[9]].config.lr, by_name[NAMES[8]].config.lr) == (1e-2, 1.2e-3)
    for run in runs:
        assert (run.config.batch_tokens, run.config.epochs) == (64, 2)


def test_settings_of_the_trainer_and_lists_can_be_swept(tmp_path: Path) -> None:
    groups = [
        {"architecture": "topk", "sweep": {"lr": [1e-3, 1e-4], "clip_norm": [None, 2], "b_dec_init": ["mean"]}},
        {"architecture": "matryoshka_batch_topk", "expansion": 2, "sweep": {"group_sizes": [[32, 32], [16, 48]]}},
    ]
    runs = load_sweep(write(tmp_path, {**SWEEP, "saes": groups})).runs()
    assert [run.name.split("/")[1] for run in runs[:6]] == [
        "topk-b_dec_initmean-lr0.001-clip_normnone-seed0",
        "topk-b_dec_initmean-lr0.001-clip_norm2-seed0",
        "topk-b_dec_initmean-lr0.0001-clip_normnone-seed0",
        "topk-b_dec_initmean-lr0.0001-clip_norm2-seed0",
        "matryoshka_batch_topk-group_sizes32+32-seed0",
        "matryoshka_batch_topk-group_sizes16+48-seed0",
    ]
    assert [run.config.clip_norm for run in runs[:2]] == [None, 2]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({**SWEEP, "colour": "blue"}, "field 'colour'"),
        ({**SWEEP, "batch_tokens": 0}, "field 'batch_tokens'"),
        ({**SWEEP, "memory_mb": 4096}, "field 'memory_mb'"),
        ({**SWEEP, "text_format": "verse"}, "field 'text_format'"),
        ({**SWEEP, "hook_points": []}, "field 'hook_points'"),
        ({**SWEEP, "hook_points": ["layer 3"]}, "'hook_points'.*layer 3"),
        ({**SWEEP, "saes": []}, "field 'saes'"),
        (with_group(architecture="topsy"), r"field 'saes\.1\.architecture': 'topsy' is not one of"),
        (with_group(options={"k": 0}), r"field 'saes\.1\.options\.k'"),
        (with_group(options={"kay": 3}), r"field 'saes\.1\.options\.kay'"),
        (with_group(sweep={"k": [4, -1]}), r"field 'saes\.1\.options\.k'"),
        (with_group(sweep={"lr": [1e-3, -1]}), r"field 'saes\.1\.sweep\.lr'"),
        (with_group(sweep={"seed": ["one"]}), r"field 'saes\.1\.sweep\.seed'"),
        (with_group(sweep={"kay": [3]}), r"field 'saes\.1\.options\.kay'"),
        (with_group(sweep={"k": []}), r"field 'saes\.1\.sweep'.*'k' lists no value"),
        (with_group(sweep={"k": 3}), r"field 'saes\.1\.sweep\.k'"),
        (with_group(sweep={"architecture": ["topk"]}), r"field 'saes\.1\.sweep'.*another group"),
        (with_group(betas=[0.9, 1.0]), r"field 'saes\.1\.betas\.1'"),
        (with_group(hook_points=["blocks.x"]), r"hook_points'.*blocks\.x"),
        (with_group(hook_points=[HOOKS[0]], hook_points_out=list(HOOKS)), r"field 'saes\.1'.*one for each"),
        (with_group(hook_points_out=[HOOKS[0]]), r"field 'saes\.1'.*one for each"),
        (with_group(architecture="batch_topk", expansion=2, options={"k": 4}), "two SAEs are"),
        (with_group(sweep={"k": [4, 4]}), "two SAEs are"),
        ("- a\n", ""),
        ("a: [", "not valid YAML"),
        ("", ""),
    ],
)
def test_a_file_with_a_wrong_field_is_refused_by_field(tmp_path: Path, content: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"sweep\.yaml.*{complaint}"):
        load_sweep(write(tmp_path, content))


def test_bytes_that_are_no_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"x\.yaml: not valid YAML"):
        load_sweep(str(tmp_path / "x.yaml"))
    for name in ("no-such-sweep", "no-such-file.yaml"):
        with pytest.raises(DataError, match=f"{name}: no such file; shipped sweeps are sweep-smollm2"):
            load_sweep(name)


def test_the_shipped_sweeps_are_valid_and_not_taken_for_presets_of_banks() -> None:
    folder = Path(__file__).parents[2] / "training" / "presets"
    names = [path.stem for path in folder.glob(f"{PREFIX}*.yaml")]
    assert names
    for name in names:
        assert load_sweep(name).runs()
    with pytest.raises(DataError) as error:
        load_preset("no-such-preset")
    assert not any(name in str(error.value) for name in names)


# ---- from text to SAEs ---------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [" ".join(f"{word}{i * j % 17}" for j, word in enumerate(("river", "garden", "kettle"))) for i in range(99)]
    path.write_text("".join(json.dumps({"text": f"{i} {line}"}) + "\n" for i, line in enumerate(lines)))
    return path


def test_from_text_to_a_table_and_again_for_nothing(
    tmp_path: Path, texts: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    out, sweep = tmp_path / "out", Sweep.model_validate(SWEEP)
    reports: list[tuple[str, int, int, str]] = []
    arguments = {
        "model": tiny_model,
        "tokenizer": tiny_tokenizer,
        "identity": identify(tiny_model, tiny_tokenizer, "tiny"),
        "data": [texts],
        "out": out,
        "report": lambda *report: reports.append(report),
    }
    trained = train_sweep(sweep, **arguments)
    assert [sae.run.name for sae in trained] == NAMES
    assert list(dict.fromkeys(stage for stage, *_ in reports)) == ["text", "harvest", "train"]
    progress = [(done, total) for stage, done, total, _ in reports if stage == "train"]
    assert progress == sorted(progress)
    assert progress[-1][0] == progress[-1][1]
    for name in NAMES:
        sae = load_saelens(out / "saes" / name)
        assert sae.hook_name == name.split("/")[0]
        assert sae.hook_name_out == ("blocks.1.hook_mlp_out" if "transcoder" in name else None)

    table = json.loads((out / "results.json").read_text())
    assert table == json.loads(json.dumps(rows(trained)))
    assert [row["name"] for row in table] == NAMES
    for row, sae in zip(table, trained, strict=True):
        assert {name: row[name] for name in ("fvu", "l0", "dead_fraction", "tokens_per_second")} == {
            name: sae.figures[name] for name in ("fvu", "l0", "dead_fraction", "tokens_per_second")
        }
    with (out / "results.csv").open(newline="") as file:
        flat = list(csv.DictReader(file))
    assert [(row["name"], row["options.k"], row["seed"]) for row in flat] == [
        (row["name"], str(row["options"]["k"]), str(row["seed"])) for row in table
    ]
    assert [float(row["fvu"]) for row in flat] == [row["fvu"] for row in table]

    before = {path: path.stat().st_mtime_ns for path in (out / "saes").rglob("*") if path.is_file()}
    more = Sweep.model_validate({**SWEEP, "saes": [*SWEEP["saes"], {"architecture": "relu", "expansion": 2}]})
    added = train_sweep(more, **arguments)
    assert {sae.run.name for sae in added} - set(NAMES) == {f"{hook}/relu-seed0" for hook in HOOKS}
    assert {path: path.stat().st_mtime_ns for path in before} == before

    cached = train_cached(sweep, open_harvest(out / "activations"), tmp_path / "again", report=lambda *_: None)
    for a, b in zip(cached, trained, strict=True):
        assert (a.folder / "sae_weights.safetensors").read_bytes() == (
            b.folder / "sae_weights.safetensors"
        ).read_bytes()
        assert json.loads((a.folder / "cfg.json").read_text())["metadata"]["model_name"] == "tiny"


def test_a_cache_without_the_hook_point_is_refused(
    tmp_path: Path, texts: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    small = Sweep.model_validate({**SWEEP, "saes": SWEEP["saes"][1:2]})
    train_sweep(
        small,
        model=tiny_model,
        tokenizer=tiny_tokenizer,
        identity=identify(tiny_model, tiny_tokenizer, "tiny"),
        data=[texts],
        out=tmp_path / "out",
        report=lambda *_: None,
    )
    cache = open_harvest(tmp_path / "out" / "activations")
    with pytest.raises(DataError, match=r"blocks\.1\.hook_resid_post"):
        train_cached(Sweep.model_validate(SWEEP), cache, tmp_path / "more", report=lambda *_: None)


def test_a_damaged_shard_is_refused_by_file_and_the_rest_goes_on_when_it_is_mended(
    tmp_path: Path, texts: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    sweep = Sweep.model_validate({**SWEEP, "saes": SWEEP["saes"][1:2]})
    arguments: dict[str, Any] = {
        "model": tiny_model,
        "tokenizer": tiny_tokenizer,
        "identity": identify(tiny_model, tiny_tokenizer, "tiny"),
        "data": [texts],
        "report": lambda *_: None,
    }
    (expected,) = train_sweep(sweep, **arguments, out=tmp_path / "plain")
    (shard,) = (tmp_path / "plain" / "activations").glob("shard-*")
    good = shard.read_bytes()
    raw = bytearray(good)
    raw[len(raw) // 2] ^= 0xFF
    shard.write_bytes(raw)
    cache = open_harvest(tmp_path / "plain" / "activations")
    with pytest.raises(DataError, match=shard.name):
        train_cached(sweep, cache, tmp_path / "again", report=lambda *_: None)
    shard.write_bytes(good)
    (found,) = train_cached(sweep, cache, tmp_path / "again", report=lambda *_: None)
    assert torch.equal(found.load().W_enc, expected.load().W_enc)
    assert found.run == expected.run
