"""A harvest is what the guard would see, and the same whatever interrupted it."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feature_bank.errors import DataError
from feature_bank.layout import ROLES
from guard.capture import truncated_forward
from guard.judge import Judged
from guard.monitor import Monitor
from guard.policy import Policy
from guard.text_scoring import TextScorer
from tests.factories import HOOKS, hooks_of, make_bank
from tests.training.samples import TOY_HOOKS, LlamaForCausalLM, contents, document, toy_harvest, toy_sequences
from training.batches import inliers
from training.cache import MANIFEST, OUTLIERS, SUMMARY, open_harvest
from training.corpus import TokenSequence, tokenise
from training.harvest import harvest, plan_shards
from training.outliers import exact_median
from training.shards import length_name

TEXTS = ("Hi.", "A somewhat longer text, with 42 in it.", "中文也要读。", "<|im_end|>\nno control token: <|im_start|>")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a harvest that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    toy_harvest(folder)
    found = contents(folder)
    assert len(shards_of(found)) > 3
    return found


def shards_of(files: Iterable[str]) -> list[str]:
    return sorted(name for name in files if name.startswith("shard-"))


class Failing(LlamaForCausalLM):
    """A model that must not be run."""

    def forward(self, *args: Any, **options: Any) -> Tensor:
        raise AssertionError("the model was run")


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

    def judge(acts: npt.NDArray[np.float32], segment: npt.NDArray[np.int64]) -> Judged:
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


def test_only_the_rows_that_count_are_kept_and_the_special_tokens_counted(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    sequences = tokenise([document(text, role=role) for text in TEXTS for role in ROLES], tiny_tokenizer, max_tokens=50)
    cache = harvest(tiny_model, sequences, HOOKS, tmp_path, fingerprint={})
    special = set(tiny_tokenizer.all_special_ids)
    assert not special & set(cache.token_ids.tolist())
    counted = sum(token in special for s in sequences for token in s.ids)
    assert cache.manifest["special_tokens"] == counted >= len(sequences)
    assert cache.manifest["rows"] == cache.tokens == sum(len(s.positions) for s in sequences)
    assert cache.manifest["tokens"] == sum(len(s.ids) for s in sequences)


def test_nothing_after_the_last_hook_point_is_computed(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    for name, module in tiny_model.named_modules():
        module.register_forward_pre_hook(count(name))
    hooks = ["blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out", "blocks.1.hook_resid_post"]
    harvest(tiny_model, toy_sequences(), hooks, tmp_path, fingerprint={}, batch_tokens=10**6)
    layers = [calls.get(f"model.layers.{i}", 0) for i in range(4)]
    assert layers == [1, 1, 1, 0]  # one forward for all hook points
    assert calls["model.layers.2.mlp"] == 1
    assert not {"model.norm", "lm_head"} & set(calls)


def test_packing_in_batches_changes_no_activation(tmp_path: Path, tiny_model: Any) -> None:
    sequences = toy_sequences(30)
    alone, packed = (
        harvest(tiny_model, sequences, HOOKS, tmp_path / str(n), fingerprint={}, batch_tokens=n, shard_tokens=n)
        for n in (1, 512)
    )
    widths: list[int] = []
    tiny_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    harvest(tiny_model, sequences, HOOKS, tmp_path / "again", fingerprint={}, batch_tokens=64)
    assert max(widths) <= 64
    assert sum(widths) < 1.2 * sum(len(s.ids) for s in sequences)  # alike lengths need little padding
    assert len(alone.shards) == 30
    assert alone.documents.tolist() == packed.documents.tolist()
    for name in HOOKS:
        torch.testing.assert_close(alone.activations(name), packed.activations(name), rtol=2**-7, atol=1e-5)


def test_the_plan_of_shards_does_not_depend_on_the_order_of_sequences() -> None:
    sequences = toy_sequences()
    expected = sorted(sequences, key=lambda s: (len(s.ids), s.document))
    for ordered in (sequences, sequences[::-1]):
        lengths, documents = (
            np.array(column) for column in zip(*((len(s.ids), s.document) for s in ordered), strict=True)
        )
        plan = plan_shards(lengths, documents, shard_tokens=30)
        assert [ordered[i] for members in plan for i in members] == expected
        assert all(30 <= lengths[members].sum() < 30 + 20 for members in plan[:-1])
        assert len(plan_shards(lengths, documents, shard_tokens=10**6)) == 1


def test_a_document_that_comes_twice_is_refused(tmp_path: Path) -> None:
    sequences = toy_sequences()
    with pytest.raises(DataError, match="document 5 comes more than once"):
        toy_harvest(tmp_path, sequences=[*sequences, sequences[5]])
    assert not list(tmp_path.iterdir())


# ---- outliers ----------------------------------------------------------------------------------------------------


def test_outliers_are_counted_by_hook_point_by_the_rule_of_the_trainer(tmp_path: Path) -> None:
    model = LlamaForCausalLM()
    model.embed[7] *= 1000  # sums of embeddings: every token from there on is long at the first hook point
    hooks = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")
    generator = np.random.default_rng(0)
    ids = [generator.integers(8, 64, 12).tolist() for _ in range(20)]
    ids[3][5] = ids[11][9] = 7
    sequences = [TokenSequence(document=i, ids=row, positions=np.arange(12)) for i, row in enumerate(ids)]
    cache = toy_harvest(tmp_path, model=model, sequences=sequences, hook_names=hooks)
    for name in hooks:
        expected = np.flatnonzero(~inliers(cache.activations(name)).numpy())
        assert cache.outliers(name).tolist() == expected.tolist()
        assert cache.summary.hook_points[name].outliers == len(expected)
        length = cache.activations(name).float().norm(dim=1)
        assert cache.summary.hook_points[name].median_length == float(length.median())
    assert cache.summary.hook_points[hooks[0]].outliers == 7 + 3
    assert cache.summary.hook_points[hooks[1]].outliers == 0  # a tanh later nothing is long


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2.0**120, width=32), min_size=1, max_size=40), st.integers(1, 40))
def test_the_median_is_exact(values: list[float], part: int) -> None:
    array = np.array(values, dtype=np.float32) + 0.0  # no negative zero
    parts = [array[i : i + part] for i in range(0, len(array), part)]
    assert exact_median(lambda: iter(parts)) == float(torch.from_numpy(array).median())


# ---- interruptions -----------------------------------------------------------------------------------------------


def stopping(after: int, error: BaseException) -> Callable[[int, int, int], None]:
    def on_shard(done: int, total: int, tokens: int) -> None:
        if done == after:
            raise error

    return on_shard


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=["interrupted", "failed"])
def test_stopped_between_any_two_shards_it_ends_the_same(
    tmp_path: Path, whole: dict[str, bytes], error: BaseException
) -> None:
    shards = shards_of(whole)
    for after in range(1, len(shards) + 1):
        folder = tmp_path / str(after)
        with pytest.raises(type(error)):
            toy_harvest(folder, on_shard=stopping(after, error))
        assert contents(folder) == {name: whole[name] for name in [MANIFEST, *shards[:after]]}
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
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, *shards_of(whole)[:2]]  # and no temporary file
    assert hooks_of(model) == 0
    toy_harvest(tmp_path, model=model)
    assert contents(tmp_path) == whole
    assert calls == 3 + len(shards_of(whole)) - 2  # the two finished shards were not made again


def test_a_finished_harvest_does_not_run_the_model(tmp_path: Path, whole: dict[str, bytes]) -> None:
    toy_harvest(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cache = toy_harvest(tmp_path, model=Failing())
    assert [p.name for p in cache.shards] == shards_of(whole)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert contents(tmp_path) == whole


def test_a_lost_shard_is_made_again_and_no_other(tmp_path: Path, whole: dict[str, bytes]) -> None:
    done: list[int] = []
    toy_harvest(tmp_path)
    (tmp_path / shards_of(whole)[2]).unlink()
    kept = (tmp_path / shards_of(whole)[1]).stat().st_mtime_ns
    with pytest.raises(DataError, match=f"{shards_of(whole)[2]}: missing"):
        open_harvest(tmp_path)
    toy_harvest(tmp_path, on_shard=lambda *numbers: done.append(numbers[0]))
    assert contents(tmp_path) == whole
    assert (tmp_path / shards_of(whole)[1]).stat().st_mtime_ns == kept
    assert done == list(range(1, len(shards_of(whole)) + 1))


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("model", {"fingerprint": {"model": "another"}}),
        ("sequences", {"sequences": toy_sequences(11)}),
        ("hook_names", {"hook_names": TOY_HOOKS[:1]}),
        ("weights", {"model": LlamaForCausalLM(width=9)}),
        ("batch_tokens", {"batch_tokens": 31}),
        ("block_rows", {"block_rows": 8}),
        ("licence", {"fingerprint": {"model": "toy", "licence": "none"}}),
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
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_a_truncated_shard_is_refused_by_name(
    tmp_path: Path, whole: dict[str, bytes], kept: float, finished: bool
) -> None:
    toy_harvest(tmp_path)
    name = shards_of(whole)[2]
    data = whole[name]
    (tmp_path / name).write_bytes(data[: len(data) // 2 if kept == 0.5 else int(kept)])
    if not finished:
        (tmp_path / SUMMARY).unlink()
    with pytest.raises(DataError, match=f"{name}.*remove it"):
        toy_harvest(tmp_path)
    (tmp_path / name).unlink()
    toy_harvest(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("field", [*TOY_HOOKS, "document", "token", length_name(TOY_HOOKS[1])])
def test_a_flipped_bit_is_refused_by_file_and_field(tmp_path: Path, whole: dict[str, bytes], field: str) -> None:
    cache = toy_harvest(tmp_path)
    name = shards_of(whole)[1]
    data = bytearray(whole[name])
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[field]["data_offsets"][0] + 3] ^= 1
    (tmp_path / name).write_bytes(data)
    (tmp_path / SUMMARY).unlink()
    reads: dict[str, Callable[[], object]] = {
        "document": lambda: cache.documents,
        "token": lambda: cache.token_ids,
        length_name(TOY_HOOKS[1]): lambda: toy_harvest(tmp_path),
        **{hook: lambda hook=hook: cache.activations(hook) for hook in TOY_HOOKS},
    }
    with pytest.raises(DataError, match=rf"{name}, field '{field}', rows 0 to .*checksum.*remove it"):
        reads[field]()


def test_a_shard_of_another_harvest_is_refused_by_name(tmp_path: Path, whole: dict[str, bytes]) -> None:
    toy_harvest(tmp_path / "a")
    toy_harvest(tmp_path / "b", fingerprint={"model": "another"})
    first, second = shards_of(whole)[:2]
    for source in (tmp_path / "b" / first, tmp_path / "a" / second):
        (tmp_path / "a" / first).write_bytes(source.read_bytes())
        (tmp_path / "a" / SUMMARY).unlink(missing_ok=True)
        with pytest.raises(DataError, match=f"{first}, field 'run'.*remove it"):
            toy_harvest(tmp_path / "a")


@pytest.mark.parametrize("name", [SUMMARY, OUTLIERS])
def test_a_damaged_summary_is_refused_by_name(tmp_path: Path, name: str) -> None:
    toy_harvest(tmp_path)
    data = (tmp_path / name).read_bytes()
    for broken in (b"", data[: len(data) // 2], data.replace(b'"bytes"', b'"octets"', 1)[1:]):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=name):
            open_harvest(tmp_path).outliers(TOY_HOOKS[0])
    (tmp_path / SUMMARY).unlink()
    toy_harvest(tmp_path)
    assert (tmp_path / name).read_bytes() == data


def test_a_folder_without_a_finished_harvest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{MANIFEST} is missing"):
        open_harvest(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        toy_harvest(tmp_path, on_shard=stopping(2, KeyboardInterrupt()))
    with pytest.raises(DataError, match=f"{SUMMARY} is missing.*run it again"):
        open_harvest(tmp_path)
    toy_harvest(tmp_path)
    cache = open_harvest(tmp_path)
    with pytest.raises(DataError, match=r"'hook_names'.*blocks\.9.*there are blocks\.0"):
        cache.activations("blocks.9.hook_resid_post")


def test_two_harvests_into_one_folder_do_not_meet(tmp_path: Path, whole: dict[str, bytes]) -> None:
    def second(done: int, total: int, tokens: int) -> None:
        if done == 1:
            with pytest.raises(DataError, match="another process is harvesting"):
                toy_harvest(tmp_path)

    toy_harvest(tmp_path, on_shard=second)
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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_number_in_one_document_is_refused_and_the_rest_kept(
    tmp_path: Path, whole: dict[str, bytes], value: float
) -> None:
    longest = max(toy_sequences(), key=lambda s: (len(s.ids), s.document))
    model = LlamaForCausalLM()
    real = model.forward

    def forward(input_ids: Tensor, **options: Any) -> Tensor:
        if input_ids.shape[1] == len(longest.ids):
            model.embed[longest.ids[longest.positions[-1]], 3] = value
        return real(input_ids, **options)

    model.forward = forward  # type: ignore[method-assign]
    # a tanh makes an infinity finite again, so the hook point before it is harvested
    with pytest.raises(DataError, match=r"NaN or infinity at blocks\.0\.hook_resid_pre \(document \d+\)"):
        toy_harvest(tmp_path, model=model, hook_names=("blocks.0.hook_resid_pre",))
    assert len(shards_of(p.name for p in tmp_path.iterdir())) == len(shards_of(whole)) - 1


def test_a_full_disk_names_the_file_and_loses_nothing_finished(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, real = shards_of(whole)[2], os.fsync

    def full(descriptor: int) -> None:
        if list(tmp_path.glob(f".{name}.*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr("feature_bank.atomic.os.fsync", full)
    with pytest.raises(DataError, match=f"{name}: cannot be written.*No space left.*run again"):
        toy_harvest(tmp_path)
    assert contents(tmp_path) == {n: whole[n] for n in [MANIFEST, *shards_of(whole)[:2]]}
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    toy_harvest(tmp_path)
    assert contents(tmp_path) == whole


def test_a_write_that_the_system_cuts_short_names_the_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))  # the manifest is smaller, a shard is larger
    try:
        with pytest.raises(DataError, match=r"shard-00000\.safetensors: cannot be written"):
            toy_harvest(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == [MANIFEST]


def test_nothing_to_harvest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        harvest(LlamaForCausalLM(), [], TOY_HOOKS, tmp_path, fingerprint={})
