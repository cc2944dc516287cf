"""A training that is killed, interrupted or robbed of its disk ends with the bits of one that nothing happened to."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from feature_bank.errors import BankError, DataError
from tests.training.samples import sparse_data
from training import checkpoints
from training.architectures import ARCHITECTURES, StepStats
from training.batches import TensorReader
from training.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from training.trainer import SaeRun, TrainedSae, TrainerConfig, train_saes

HOOK, OUT = "blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"
# 12 steps in two passes, a checkpoint after 5 and 10, and dead features from the second step on
CONFIG = TrainerConfig(
    options={"k": 2},
    expansion=3,
    batch_tokens=32,
    epochs=2,
    dead_after_tokens=40,
    checkpoint_every=5,
    checkpoint_seconds=0,
)
STEPS = 12
Report = Callable[[SaeRun, int, int, StepStats], None]


class StopTrainingError(Exception):
    """What interrupts a run here."""


def make_reader() -> TensorReader:
    data = sparse_data(200, d_in=8, features=12, active=2).to(torch.bfloat16)
    return TensorReader({HOOK: data, OUT: data[:, :6].flip(1).contiguous()}, batch_tokens=32, seed=3)


def one_of_each(**settings: Any) -> list[SaeRun]:
    """A run of every architecture, and a second one of the first with more steps between its checkpoints."""
    runs = []
    for name, kind in sorted(ARCHITECTURES.items()):
        options = {"k": 2} if "k" in kind.Options.model_fields else {}
        config = dataclasses.replace(CONFIG, architecture=name, options=options, **settings)
        runs.append(SaeRun(HOOK, config, OUT if name == "skip_transcoder" else None))
    runs.append(SaeRun(HOOK, dataclasses.replace(runs[0].config, seed=1, checkpoint_every=7)))
    return runs


def weights(trained: list[TrainedSae]) -> dict[str, bytes]:
    return {sae.run.name: (sae.folder / "sae_weights.safetensors").read_bytes() for sae in trained}


def assert_same(found: list[TrainedSae], expected: list[TrainedSae]) -> None:
    assert weights(found) == weights(expected)
    for a, b in zip(found, expected, strict=True):
        for name in (*StepStats._fields, "steps", "tokens"):
            assert a.figures[name] == b.figures[name]


def stopping_at(step: int, run: str | None = None) -> Report:
    def report(of: SaeRun, done: int, steps: int, stats: StepStats) -> None:
        if done == step and run in (None, of.name):
            raise StopTrainingError

    return report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[TrainedSae]:
    """A training that nothing interrupted."""
    dead: list[float] = []
    found = train_saes(
        make_reader(),
        one_of_each(),
        tmp_path_factory.mktemp("whole"),
        on_step=lambda *a: dead.append(a[3].dead_fraction),
    )
    assert len(dead) == STEPS * len(found)
    assert max(dead) > 0  # or the clocks of dead features would not be tested
    return found


# ---- killed --------------------------------------------------------------------------------------

LAST = STEPS - 1


def train_to_the_last_checkpoint(folder: Path, go_on: bool) -> None:
    """In a process of its own: train with a checkpoint after every step, and unless `go_on` stop after the last one."""
    torch.set_num_threads(1)
    (folder / "started").touch()
    runs = one_of_each(checkpoint_every=1)[:-1]
    try:
        train_saes(make_reader(), runs, folder, on_step=None if go_on else stopping_at(STEPS, runs[0].name))
    except StopTrainingError:
        (folder / "stopped").touch()


def last_checkpoints(folder: Path) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """By run: the tensors (weights, moments, buffers) and the state (position, figures) of the newest checkpoint."""
    found = {}
    for run in one_of_each()[:-1]:
        path = folder / "checkpoints" / run.name / f"step-{LAST:09d}"
        record = json.loads((path / "state.json").read_text())
        del record["state"]["seconds"]
        found[run.name] = (load_file(path / "tensors.safetensors"), record)
    return found


@pytest.mark.slow
def test_killed_at_random_moments_it_has_the_same_weights_optimiser_and_position(
    tmp_path: Path, whole: list[TrainedSae]
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])

    def start(folder: Path, go_on: bool) -> multiprocessing.process.BaseProcess:
        (folder / "started").unlink(missing_ok=True)
        process = context.Process(target=train_to_the_last_checkpoint, args=(folder, go_on))
        process.start()
        deadline = time.monotonic() + 120
        while not (folder / "started").exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        return process

    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for folder in (plain, killed):
        folder.mkdir()
    process = start(plain, False)
    began = time.monotonic()
    process.join(120)
    duration = time.monotonic() - began
    assert (plain / "stopped").exists()

    moments, kills = random.Random(7), 0
    while kills < 6:
        process = start(killed, False)
        process.join(moments.uniform(0.05, 0.5) * duration)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        if process.exitcode == 0:  # it ended just before
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 1
    if not (killed / "stopped").exists():
        start(killed, False).join(120)
    assert (killed / "stopped").exists()

    found, expected = last_checkpoints(killed), last_checkpoints(plain)
    assert found.keys() == expected.keys()
    for name, (tensors, record) in expected.items():
        assert found[name][1] == record, name  # the file's hash is part of it
        assert found[name][0].keys() == tensors.keys()
        assert any(key.startswith("exp_avg_sq.") for key in tensors)
        for key, tensor in tensors.items():
            assert torch.equal(found[name][0][key], tensor), (name, key)
    process = start(killed, True)
    process.join(120)
    assert process.exitcode == 0
    runs = one_of_each(checkpoint_every=1)[:-1]
    resumed = train_saes(make_reader(), runs, killed, on_step=lambda *_: pytest.fail("trained again"))
    assert_same(resumed, whole[:-1])
    assert not [path for path in killed.rglob("*") if path.name.endswith((".tmp", ".old")) or "step-" in path.name]


# ---- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 5, 6, 8, 11, 12])
def test_interrupted_at_any_step_it_ends_the_same(tmp_path: Path, whole: list[TrainedSae], stop_at: int) -> None:
    runs = one_of_each()
    victim = runs[stop_at % len(runs)].name  # so the others are a step ahead or behind
    with pytest.raises(StopTrainingError):
        train_saes(make_reader(), runs, tmp_path, on_step=stopping_at(stop_at, victim))
    assert_same(train_saes(make_reader(), runs, tmp_path), whole)


def test_interrupted_again_and_again_it_ends_the_same(tmp_path: Path, whole: list[TrainedSae]) -> None:
    often = one_of_each(checkpoint_every=1)[:-1]
    for stop_at in range(2, STEPS + 1):
        with pytest.raises(StopTrainingError):
            train_saes(make_reader(), often, tmp_path, on_step=stopping_at(stop_at))
    assert_same(train_saes(make_reader(), often, tmp_path), whole[:-1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_after_the_step_with_checkpoints(
    tmp_path: Path, whole: list[TrainedSae], number: signal.Signals
) -> None:
    def send(run: SaeRun, step: int, steps: int, stats: StepStats) -> None:
        if step == 8 and run.config.architecture == "topk":
            os.kill(os.getpid(), number)

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, ended)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_saes(make_reader(), one_of_each(), tmp_path, on_step=send)
        assert signal.getsignal(number) is ended
    finally:
        signal.signal(number, before)
    newest = [max(path.iterdir()).name for path in (tmp_path / "checkpoints").glob("*/*")]
    assert newest == ["step-000000008"] * len(whole)
    steps: list[int] = []
    resumed = train_saes(make_reader(), one_of_each(), tmp_path, on_step=lambda r, step, *_: steps.append(step))
    assert min(steps) == 9
    assert_same(resumed, whole)


def test_the_position_is_not_counted_by_the_reader_alone(tmp_path: Path, whole: list[TrainedSae]) -> None:
    """Runs whose checkpoints are of different steps, and one that is new, go on together."""
    runs = one_of_each()
    with pytest.raises(StopTrainingError):
        train_saes(make_reader(), runs[1:], tmp_path, on_step=stopping_at(8, runs[1].name))
    kept = {path.parent.name: path.name for path in (tmp_path / "checkpoints").glob("*/*/*")}
    assert set(kept.values()) == {"step-000000005", "step-000000007"}
    assert_same(train_saes(make_reader(), runs, tmp_path), whole)


# ---- what is refused, what is survived -----------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A folder with checkpoints of one run after steps 5 and 10."""
    with pytest.raises(StopTrainingError):
        train_saes(make_reader(), [SaeRun(HOOK, CONFIG)], tmp_path, on_step=stopping_at(11))
    return tmp_path


def folders(stopped: Path) -> list[Path]:
    """Of the checkpoints, oldest first."""
    found = sorted((stopped / "checkpoints").glob("*/*/step-*"))
    assert [path.name for path in found] == ["step-000000005", "step-000000010"]
    return found


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"options": {"k": 3}}, r"fingerprint\.config\.options\.k|config\.options\.k"),
        ({"lr": 1e-3}, r"config\.lr"),
        ({"seed": 1}, r"config\.seed"),
        ({"epochs": 3}, r"config\.epochs"),
        ({"expansion": 4}, r"config\.expansion"),
        ({"clip_norm": None}, r"config\.clip_norm"),
        ({"decay": "cosine"}, r"config\.decay"),
        ({"autocast": True}, r"config\.autocast"),
        ({"architecture": "topk"}, r"config\.architecture"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_what_belongs_to_another_configuration_is_refused_by_field(
    stopped: Path, change: dict[str, Any], field: str, finished: bool
) -> None:
    run = SaeRun(HOOK, CONFIG)
    if finished:
        train_saes(make_reader(), [run], stopped)
    other = SaeRun(HOOK, dataclasses.replace(CONFIG, **change), name=run.name)
    with pytest.raises(DataError, match=rf"{'cfg' if finished else 'state'}\.json, field '\S*({field})'.*another conf"):
        train_saes(make_reader(), [other], stopped)
    (found,) = train_saes(make_reader(), [run], stopped)  # and what was there is still good
    assert found.figures["steps"] == STEPS


@pytest.mark.parametrize("finished", [False, True])
def test_what_belongs_to_other_activations_is_refused_by_field(stopped: Path, finished: bool) -> None:
    run = SaeRun(HOOK, CONFIG)
    if finished:
        train_saes(make_reader(), [run], stopped)
    data = make_reader()._activations[HOOK]
    for other, field in (
        ({HOOK: data[:, :7], OUT: data}, "d_in"),
        ({HOOK: data[:-1], OUT: data[:-1]}, r"data\.\S+"),
        ({HOOK: data * 2, OUT: data}, r"data\.sample\.blocks.0.hook_resid_post"),
    ):
        with pytest.raises(DataError, match=rf"\.json, field '(metadata\.training\.fingerprint\.)?{field}'"):
            train_saes(TensorReader(other, batch_tokens=32, seed=3), [run], stopped)
    with pytest.raises(DataError, match=r"data\.order\.seed"):
        train_saes(TensorReader({HOOK: data}, batch_tokens=32, seed=4), [run], stopped)


def test_the_circumstances_may_change_on_the_way(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = dataclasses.replace(CONFIG, device="cpu", prefetch=0, checkpoint_every=3, checkpoint_seconds=9.0)
    resumed = train_saes(make_reader(), [SaeRun(HOOK, moved)], stopped)
    assert_same(resumed, train_saes(make_reader(), [SaeRun(HOOK, CONFIG)], tmp_path_factory.mktemp("plain")))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def without(field: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != field}))

    damage.__name__ = f"without_{field}"
    return damage


DAMAGES = [
    ("tensors.safetensors", cut, "field 'sha256'"),
    ("tensors.safetensors", flip, "field 'sha256'"),
    ("tensors.safetensors", Path.unlink, "No such file"),
    ("state.json", cut, "damaged"),
    ("state.json", Path.unlink, "No such file"),
    ("state.json", lambda path: path.write_bytes(b"\xff"), "damaged"),
    ("state.json", lambda path: path.write_text("[]"), "damaged"),
    *(("state.json", without(field), f"field '{field}'") for field in ("fingerprint", "step", "sha256", "state")),
]


@pytest.mark.parametrize(("file", "damage", "complaint"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    stopped: Path,
    file: str,
    damage: Callable[[Path], None],
    complaint: str,
    caplog: pytest.LogCaptureFixture,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    newer = folders(stopped)[-1]
    damage(newer / file)
    run, steps = SaeRun(HOOK, CONFIG), []
    resumed = train_saes(make_reader(), [run], stopped, on_step=lambda r, step, *_: steps.append(step))
    assert steps[0] == 6
    (message,) = (record.getMessage() for record in caplog.records)
    assert str(newer / file) in message
    assert complaint in message
    assert_same(resumed, train_saes(make_reader(), [run], tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize(("file", "damage", "complaint"), DAMAGES)
def test_without_any_good_checkpoint_the_run_is_refused_not_begun_anew(
    stopped: Path, file: str, damage: Callable[[Path], None], complaint: str
) -> None:
    for path in folders(stopped):
        damage(path / file)
    with pytest.raises(DataError, match=rf"step-000000010/{file}.*{complaint}.*remove .* to train this one from the"):
        train_saes(make_reader(), [SaeRun(HOOK, CONFIG)], stopped)


@pytest.mark.parametrize("missing", ["W_dec", "exp_avg.W_dec", "buffer.tokens_since_fired"])
def test_a_checkpoint_of_other_tensors_is_refused_by_field(stopped: Path, missing: str) -> None:
    folder = folders(stopped)[-1]
    record = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    for altered in ({k: v for k, v in tensors.items() if k != missing}, {**tensors, missing: tensors[missing][:1]}):
        write_checkpoint(folder.parent, Checkpoint(10, altered, record["state"]), fingerprint=record["fingerprint"])
        with pytest.raises(DataError, match=rf"field '{missing}': the checkpoint has"):
            train_saes(make_reader(), [SaeRun(HOOK, CONFIG)], stopped)


def full_disk(after: int, error: Exception) -> Callable[..., None]:
    """save_file that leaves half a file and fails, from its call number `after` on."""
    calls = 0

    def fail(tensors: dict[str, Tensor], path: Path, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= after:
            return save_file(tensors, path, *args)
        Path(path).write_bytes(b"half of a file")
        raise error

    return fail


NO_SPACE = [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", NO_SPACE)
def test_a_full_disk_costs_no_checkpoint_and_no_finished_sae(
    tmp_path: Path, whole: list[TrainedSae], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    runs = one_of_each()
    first = train_saes(make_reader(), runs[:2], tmp_path)
    monkeypatch.setattr(checkpoints, "save_file", full_disk(8, error))
    with pytest.raises(DataError, match=r"step-0000000\d\d: the checkpoint of step \d+ .*No space left.*make room"):
        train_saes(make_reader(), runs, tmp_path)
    monkeypatch.undo()
    assert weights(first) == weights(whole[:2])
    kept = list((tmp_path / "checkpoints").glob("*/*/step-*"))
    assert len(kept) >= 6
    assert not list(tmp_path.rglob(".step-*"))
    steps: list[int] = []
    assert_same(train_saes(make_reader(), runs, tmp_path, on_step=lambda r, step, *_: steps.append(step)), whole)
    assert min(steps) > 5


@pytest.mark.parametrize("error", NO_SPACE)
def test_a_disk_that_is_full_at_the_end_costs_no_more_than_the_steps_since_the_checkpoint(
    tmp_path: Path, whole: list[TrainedSae], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import feature_bank.formats.saelens as saelens

    runs = one_of_each()
    monkeypatch.setattr(saelens, "save_file", full_disk(3, error))
    with pytest.raises(DataError, match=rf"{runs[3].name}: the trained SAE cannot be written .*No space left"):
        train_saes(make_reader(), runs, tmp_path)
    monkeypatch.undo()
    trained: dict[str, int] = {}
    resumed = train_saes(make_reader(), runs, tmp_path, on_step=lambda r, step, *_: trained.setdefault(r.name, step))
    assert_same(resumed, whole)
    assert trained == {run.name: 8 if run is runs[-1] else 11 for run in runs[3:]}


def test_the_last_good_checkpoint_is_never_removed_before_the_next_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present: list[list[str]] = []
    real = checkpoints.save_file

    def watching(tensors: dict[str, Tensor], path: Path) -> None:
        present.append(sorted(p.name for p in path.parent.parent.glob("step-*")))
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", watching)
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, Checkpoint(step, {"w": torch.ones(2) * step}, {}), fingerprint={})
    names = [f"step-{step:09d}" for step in (1, 2, 3, 4)]
    assert present == [[], names[:1], names[:2], names[1:3]]
    assert sorted(p.name for p in tmp_path.iterdir()) == names[2:]
    found = read_checkpoint(tmp_path, fingerprint={})
    assert found is not None
    assert (found.step, found.tensors["w"].tolist()) == (4, [4.0, 4.0])


def test_a_finished_sae_that_was_damaged_is_refused_by_file(stopped: Path) -> None:
    (sae,) = train_saes(make_reader(), [SaeRun(HOOK, CONFIG)], stopped)
    cfg = sae.folder / "cfg.json"
    good = cfg.read_text()
    for raw in ("{", "{}", '{"metadata": {}}', '{"metadata": {"training": {}}}'):
        cfg.write_text(raw)
        with pytest.raises(DataError, match=r"cfg\.json, field 'metadata\.training': damaged"):
            train_saes(make_reader(), [SaeRun(HOOK, CONFIG)], stopped)
    cfg.write_text(good)
    cut(sae.folder / "sae_weights.safetensors")
    with pytest.raises(BankError, match=r"sae_weights\.safetensors"):
        sae.load()
