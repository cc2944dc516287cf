"""A harvest is what the guard would see, and the same whatever interrupted it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_bank.errors import DataError
from feature_bank.layout import ROLES
from guard.capture import truncated_forward
from guard.monitor import Judged, Monitor
from guard.policy import Policy
from guard.text_scoring import TextScorer
from tests.factories import HOOKS, hooks_of, make_bank
from tests.training.samples import TOY_HOOKS, LlamaForCausalLM, contents, document, toy_harvest, toy_sequences
from training.corpus import tokenise
from training.harvest import MANIFEST, harvest, plan_shards

ROOT = Path(__file__).parents[2]
TEXTS = ("Hi.", "A somewhat longer text, with 42 in it.", "中文也要读。", "<|im_end|>\nno control token: <|im_start|>")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a harvest that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    toy_harvest(folder)
    found = contents(folder)
    assert len(found) > 4
    return found


def test_what_is_harvested_is_what_the_guard_reads(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [document(text, role=role) for text in TEXTS for role in ROLES]
    sequences = tokenise(documents, tiny_tokenizer, max_tokens=30)  # one text is longer than that
    cache = harvest(tiny_model, sequences, HOOKS, tmp_path / "cache", fingerprint={}, shard_tokens=80)
    assert len(cache.shards) > 2

    monitor = Monitor(make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer), Policy.default(), torch.device("cpu"))
    scorer = TextScorer(monitor, tiny_model, tiny_tokenizer)
    read: dict[str, Tensor] = {}
    judged: list[int] = []
    real_encode, real_judge = monitor.encoder.encode, monitor.judge

    def encode(hidden: dict[str, Tensor]) -> Tensor:
        read.update(hidden)
        return real_encode(hidden)

    def judge(acts: Tensor, segment: Tensor) -> Judged:
        judged.append(len(acts))
        return real_judge(acts, segment)

    monkeypatch.setattr(monitor.encoder, "encode", encode)
    monkeypatch.setattr(monitor, "judge", judge)

    for sequence in sequences:
        d = documents[sequence.document]
        trace = scorer.trace(d.text, d.role)
        rows = cache.documents == sequence.document
        length, cut = len(sequence.ids), len(d.text.encode()) > 30
        start = length - min(len(trace.tokens), 30)
        observed = [start + t.index for t in trace.tokens if t.observed and start + t.index < length]
        assert observed == [p for p in sequence.positions if p >= start]
        assert cut or judged[-1] == len(sequence.positions) == rows.sum()
        assert cache.token_ids[rows].tolist() == [sequence.ids[p] for p in sequence.positions]
        for name in HOOKS:
            harvested, monitored = cache.activations(name)[torch.from_numpy(rows)], read[name][sequence.positions]
            assert harvested.dtype == torch.bfloat16
            torch.testing.assert_close(harvested.float(), monitored, rtol=2**-7, atol=1e-5)


def test_every_document_is_harvested_once_and_in_order(tmp_path: Path) -> None:
    sequences = toy_sequences()
    cache = toy_harvest(tmp_path, sequences=sequences)
    changes = np.flatnonzero(np.diff(cache.documents)) + 1
    runs = [int(part[0]) for part in np.split(cache.documents, changes)]
    assert sorted(runs) == [s.document for s in sequences]
    for s in sequences:
        assert cache.token_ids[cache.documents == s.document].tolist() == [s.ids[p] for p in s.positions]
    assert cache.activations(TOY_HOOKS[0]).shape == (len(cache.documents), 8)


def test_the_plan_of_shards_does_not_depend_on_the_order_of_sequences() -> None:
    sequences = toy_sequences()
    assert plan_shards(sequences[::-1], shard_tokens=30) == plan_shards(sequences, shard_tokens=30)
    assert plan_shards(sequences, shard_tokens=10**6) == [sorted(sequences, key=lambda s: (len(s.ids), s.document))]


def stopping(after: int, error: BaseException) -> Callable[[int, int, int], None]:
    def on_shard(done: int, total: int, tokens: int) -> None:
        if done == after:
            raise error

    return on_shard


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=["interrupted", "failed"])
def test_stopped_between_any_two_shards_it_ends_the_same(
    tmp_path: Path, whole: dict[str, bytes], error: BaseException
) -> None:
    shards = len(whole) - 1
    for after in range(1, shards + 1):
        folder = tmp_path / str(after)
        with pytest.raises(type(error)):
            toy_harvest(folder, on_shard=stopping(after, error))
        assert contents(folder) == {name: whole[name] for name in sorted(whole)[: after + 1]}  # the manifest is first
        toy_harvest(folder)
        assert contents(folder) == whole


def test_an_interruption_loses_at_most_the_shard_in_work(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, real = LlamaForCausalLM(), 0, truncated_forward

    def forward(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("training.harvest.truncated_forward", forward)
    with pytest.raises(KeyboardInterrupt):
        toy_harvest(tmp_path, model=model)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(whole)[:3]  # and no temporary file
    assert hooks_of(model) == 0
    toy_harvest(tmp_path, model=model)
    assert contents(tmp_path) == whole
    assert calls == 3 + len(whole) - 1 - 2  # the two finished shards were not made again


def test_killed_while_writing_a_shard_it_ends_the_same(tmp_path: Path, whole: dict[str, bytes]) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.training.samples import harvest_killed_while_writing; "
        "harvest_killed_while_writing(Path(sys.argv[1]), 2)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False, timeout=120)
    assert ended.returncode == -9
    assert list(contents(tmp_path)) == sorted(whole)[:3]
    assert len(list(tmp_path.glob(".*.tmp"))) == 1  # half a shard, under a name that no reader looks for
    done: list[int] = []
    cache = toy_harvest(tmp_path, on_shard=lambda *numbers: done.append(numbers[0]))
    assert contents(tmp_path) == whole
    assert done == list(range(1, len(whole)))
    assert len(cache.documents) == sum(len(s.positions) for s in toy_sequences())


def test_a_finished_harvest_does_not_touch_the_model(tmp_path: Path, whole: dict[str, bytes]) -> None:
    toy_harvest(tmp_path)
    broken: Any = object()
    cache = toy_harvest(tmp_path, model=broken)
    assert {p.name for p in cache.shards} == set(whole) - {MANIFEST}


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("model", {"fingerprint": {"model": "another"}}),
        ("sequences", {"sequences": toy_sequences(11)}),
        ("hook_names", {"hook_names": TOY_HOOKS[:1]}),
        ("shard_tokens", {"shard_tokens": 31}),
    ],
)
def test_a_folder_of_another_harvest_is_refused_by_field(tmp_path: Path, field: str, options: dict[str, Any]) -> None:
    toy_harvest(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=rf"{MANIFEST}, field '{field}'.*{tmp_path.name}"):
        toy_harvest(tmp_path, **options)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kept", [0, 5, 0.5, -1], ids=["emptied", "cut in its header", "halved", "short of a byte"])
def test_a_truncated_shard_is_refused_by_name(tmp_path: Path, whole: dict[str, bytes], kept: float) -> None:
    toy_harvest(tmp_path)
    name = sorted(whole)[2]
    data = whole[name]
    (tmp_path / name).write_bytes(data[: len(data) // 2 if kept == 0.5 else int(kept)])
    with pytest.raises(DataError, match=f"{name}.*remove it"):
        toy_harvest(tmp_path)
    (tmp_path / name).unlink()
    toy_harvest(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps("x")])
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=rf"{MANIFEST}: damaged"):
        toy_harvest(tmp_path)


def test_a_model_that_gives_no_numbers_is_refused_by_hook_point(tmp_path: Path) -> None:
    model = LlamaForCausalLM()
    model.get_parameter("model.layers.1.bias")[0] = torch.nan
    with pytest.raises(DataError, match=TOY_HOOKS[1]):
        toy_harvest(tmp_path, model=model)
    assert [p.name for p in tmp_path.iterdir()] == [MANIFEST]


def test_nothing_to_harvest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        harvest(LlamaForCausalLM(), [], TOY_HOOKS, tmp_path, fingerprint={})
