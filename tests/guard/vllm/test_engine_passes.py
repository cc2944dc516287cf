"""What a scheduler may do to a sequence: prompts in chunks, requests that are preempted, two ranks, wrong settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from feature_bank.bank import Bank, shipped_bank_path
from feature_bank.layout import chat_ids
from guard.capture import truncated_forward
from guard.core import Guard
from guard.encoder import SelectedEncoder
from guard.models import load_model
from tests.factories import make_bank, make_tiny_model
from tests.guard.conftest import VARIED
from tests.guard.vllm.engine_fixtures import STEERED, Start, actions, needs_vllm, start
from tests.guard.vllm.engine_process import EngineProcess
from tests.guard.vllm.engine_prompts import HARMLESS, POLITICS, TERROR

__all__ = ["start"]
pytestmark = [pytest.mark.vllm, pytest.mark.slow, needs_vllm]
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
PROMPTS = [POLITICS, TERROR, *HARMLESS[1:7]]


@pytest.fixture(scope="module")
def steered_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "steered.yaml"
    path.write_text(STEERED)
    return path


@pytest.fixture(scope="module")
def exact(start: Start, steered_policy: Path) -> Iterator[EngineProcess]:
    """In float32, as the transformers engine of the comparison."""
    with start("exact", guard={"SAILGUARD_POLICY": str(steered_policy)}, enforce_eager=True, dtype="float32") as engine:
        yield engine


def test_activations_are_those_of_the_transformers_engine(exact: EngineProcess) -> None:
    loaded = load_model(dtype="float32")
    exact.rpc("probe_record")
    ((answer,),) = exact.chat([HARMLESS[1]], GREEDY)
    theirs = {position: acts for _, position, acts in exact.rpc("probe_acts")}
    bank = Bank.load(shipped_bank_path())
    encoder = SelectedEncoder(bank, torch.device("cpu"))
    ids, _ = chat_ids(loaded.tokenizer, [{"role": "user", "content": HARMLESS[1]}], add_generation_prompt=True)
    whole = [*ids, *answer["ids"]]
    with torch.inference_mode():
        hidden = truncated_forward(loaded.model, encoder.hook_names, torch.tensor([whole]))
        ours = encoder.encode({name: x[0] for name, x in hidden.items()})

    assert sorted(theirs) == list(range(len(whole)))
    found = torch.tensor([theirs[position] for position in range(len(whole))])
    torch.testing.assert_close(found, ours, atol=1e-3, rtol=1e-3)


def test_steered_answers_are_those_of_the_transformers_engine(exact: EngineProcess, steered_policy: Path) -> None:
    loaded = load_model(dtype="float32")
    ((answer,),) = exact.chat([POLITICS], {"temperature": 0.0, "max_tokens": 8})
    with Guard.from_bank(policy=steered_policy).attach(loaded.model, loaded.tokenizer) as attached:
        ours = attached.chat([{"role": "user", "content": POLITICS}], max_new_tokens=8)

    assert answer["report"]["action"] == ours.report.action == "steer"
    assert answer["text"] == ours.text
    for scores in ("prompt_scores", "response_scores"):
        assert answer["report"][scores] == pytest.approx(getattr(ours.report, scores), abs=1e-3)


def test_prompts_in_chunks_and_preempted_requests_get_the_same_verdicts(
    start: Start, exact: EngineProcess, steered_policy: Path
) -> None:
    long = {**GREEDY, "max_tokens": 40}
    expected = [answer for (answer,) in exact.chat(PROMPTS, long)]
    with start(
        "cut",
        guard={"SAILGUARD_POLICY": str(steered_policy)},
        enforce_eager=True,
        dtype="float32",
        max_num_batched_tokens=16,
        max_num_seqs=8,
        max_model_len=256,
        block_size=32,
        num_gpu_blocks_override=11,
    ) as engine:
        engine.rpc("probe_record")
        found = [answer for (answer,) in engine.chat(PROMPTS, long)]
        passes = [share for shares in engine.rpc("probe_passes") for share in shares]

    assert max(n for _, _, n in passes) <= 16
    positions = [(request, first + i) for request, first, n in passes for i in range(n)]
    assert len(positions) > len(set(positions)), "some request must have been preempted and read again"
    for got, wanted in zip(found, expected, strict=True):
        report = got["report"]
        assert got["ids"] == wanted["ids"]
        assert report["tokens_generated"] == report["tokens_observed"] == wanted["report"]["tokens_observed"]
        assert actions(report, "prompt") == actions(wanted["report"], "prompt")
        assert actions(report, "response") == actions(wanted["report"], "response")
        for scores in ("prompt_scores", "response_scores"):
            assert report[scores] == pytest.approx(wanted["report"][scores], abs=1e-3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> tuple[Path, Path]:
    """A model whose heads divide by two, as the embedded model's nine do not, and a bank for it."""
    folder = tmp_path_factory.mktemp("small")
    model = make_tiny_model(hidden_size=128)
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    make_bank(folder / "bank", model, tiny_tokenizer, fires=VARIED)
    return folder / "model", folder / "bank"


def test_two_tensor_parallel_ranks_give_the_verdicts_of_one(
    start: Start, small: tuple[Path, Path], tmp_path: Path
) -> None:
    model, bank = small
    (tmp_path / "tenants.yaml").write_text("tenants:\n  lab: {policy: monitor, overrides: true}\n")
    guard = {"SAILGUARD_BANK": str(bank), "SAILGUARD_TENANTS": str(tmp_path / "tenants.yaml")}
    lab = {"sailguard_tenant": "lab"}
    asked = [{**GREEDY, "extra_args": {**lab, "sailguard_steer": what}} for what in ("politics=2", "violence=clamp:1")]
    params = [*asked, *[{**GREEDY, "extra_args": lab}] * 4]
    found = []
    for ranks in (1, 2):
        with start(
            f"ranks{ranks}",
            guard={**guard, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            model=model,
            enforce_eager=True,
            dtype="float32",
            max_model_len=256,
            tensor_parallel_size=ranks,
        ) as engine:
            described = engine.ask(op="rpc", method="sailguard", args=[])
            engine.ask(op="rpc", method="probe_record", args=[])
            found.append([answer for (answer,) in engine.chat(list(HARMLESS[:6]), params)])
            steered = engine.ask(op="rpc", method="probe_steered", args=[])

    assert [rank["tokens_read"] for rank in described] == [0, None]
    assert len(steered) == 2
    assert steered[0] == steered[1] != []
    for one, two in zip(*found, strict=True):
        assert two["ids"] == one["ids"]
        for phase in ("prompt", "response"):
            assert actions(two["report"], phase) == actions(one["report"], phase)
        for scores in ("prompt_scores", "response_scores"):
            assert two["report"][scores] == pytest.approx(one["report"][scores], abs=1e-3)


def test_an_engine_with_a_bank_that_was_tampered_with_does_not_come_up(start: Start, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(shipped_bank_path(), bank)
    with (bank / "features.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RuntimeError, match=r"BankError: .*features\.jsonl"):
        start("tampered", guard={"SAILGUARD_BANK": str(bank)}, enforce_eager=True)


def test_an_engine_that_the_guard_cannot_follow_does_not_come_up(start: Start) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(RuntimeError, match="speculative decoding"):
        start("drafts", guard={"SAILGUARD_BANK": "shipped"}, enforce_eager=True, speculative_config=speculative)


def test_an_engine_without_the_plugin_does_not_come_up(start: Start) -> None:
    with pytest.raises(RuntimeError, match="has not loaded the plugin"):
        start("silent", guard={"SAILGUARD_BANK": "shipped", "VLLM_PLUGINS": "another"}, enforce_eager=True)
