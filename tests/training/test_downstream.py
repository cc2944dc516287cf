"""Figures of SAEs in the model follow from logits edited by hand, for one or many; what has no figure is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_bank.errors import BankError, DataError
from feature_bank.sae import SAE
from guard.errors import GuardError
from tests.training.quality_samples import (
    HOOK,
    MLP,
    WIDTH,
    constant_sae,
    identity_sae,
    in_model,
    model_sae,
    on_rows,
    texts,
    transcoder,
)
from tests.training.samples import random_sae, sparse_data
from training.corpus import TokenSequence
from training.downstream import measure_quality
from training.quality import measure_reconstruction
from training.splicing import TokenBatch


@pytest.mark.parametrize("hook_name", [HOOK, MLP, "blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("splice_at", ["content", "all"])
def test_splicing_an_identity_loses_nothing(tiny_model: Any, hook_name: str, ablation: Any, splice_at: Any) -> None:
    found = in_model(tiny_model, identity_sae(hook_name), ablation=ablation, splice_at=splice_at).downstream
    assert found is not None
    assert found.ce_loss_with_sae == pytest.approx(found.ce_loss_without_sae, rel=1e-6)
    assert found.ce_loss_recovered == pytest.approx(1, abs=1e-3)
    assert found.kl_div_with_sae == pytest.approx(0, abs=1e-7)
    assert found.kl_div_score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("splice_at", ["content", "all"])
def test_a_zero_sae_recovers_nothing(tiny_model: Any, splice_at: Any) -> None:
    found = in_model(tiny_model, constant_sae(torch.zeros(WIDTH)), splice_at=splice_at).downstream
    assert found is not None
    assert found.ce_loss_recovered == 0
    assert found.kl_div_score == 0
    assert found.kl_div_with_sae == found.kl_div_with_ablation > 0


def test_an_sae_that_gives_the_mean_recovers_nothing_of_mean_ablation(tiny_model: Any) -> None:
    batch = TokenBatch.of(texts(), torch.device("cpu"))
    mean = states(tiny_model, batch)[batch.content].mean(0)
    found = in_model(tiny_model, constant_sae(mean), ablation="mean").downstream
    assert found is not None
    assert found.ablation == "mean"
    assert found.ce_loss_with_sae == pytest.approx(found.ce_loss_with_ablation, rel=1e-6)


def states(model: Any, batch: TokenBatch) -> Tensor:
    hidden: Tensor = model(batch.ids, attention_mask=batch.mask, output_hidden_states=True).hidden_states[2]
    return hidden  # after block 1


def test_figures_follow_from_logits_of_a_model_edited_by_hand(tiny_model: Any) -> None:
    sae, sequences = model_sae(), texts()
    found = in_model(tiny_model, sae).downstream
    assert found is not None
    sums = dict.fromkeys(["clean", "sae", "zero", "kl_sae", "kl_zero"], 0.0)
    ce_tokens = kl_tokens = 0
    for s in sequences:
        ids = torch.tensor([s.ids])
        replaced: dict[str, Tensor] = {}
        for kind in ("clean", "sae", "zero"):

            def edit(_: Any, __: Any, output: Tensor, kind: str = kind, s: TokenSequence = s) -> Tensor:
                changed = output.clone()
                if kind == "sae":
                    changed[0, s.positions] = sae.reconstruct(output[0, s.positions])
                elif kind == "zero":
                    changed[0, s.positions] = 0.0
                return changed

            handle = tiny_model.model.layers[1].register_forward_hook(edit)
            replaced[kind] = tiny_model(ids).logits[0].double().log_softmax(-1)
            handle.remove()
        for p in s.positions:
            kl_tokens += 1
            for kind in ("sae", "zero"):
                clean = replaced["clean"][p]
                sums[f"kl_{kind}"] += float((clean.exp() * (clean - replaced[kind][p])).sum())
            if p + 1 < len(s.ids):
                ce_tokens += 1
                for kind in ("clean", "sae", "zero"):
                    sums[kind] -= float(replaced[kind][p, s.ids[p + 1]])
    assert (found.ce_tokens, found.kl_tokens) == (ce_tokens, kl_tokens)
    assert found.ce_loss_without_sae == pytest.approx(sums["clean"] / ce_tokens, rel=1e-5)
    assert found.ce_loss_with_sae == pytest.approx(sums["sae"] / ce_tokens, rel=1e-5)
    assert found.ce_loss_with_ablation == pytest.approx(sums["zero"] / ce_tokens, rel=1e-5)
    assert found.kl_div_with_sae == pytest.approx(sums["kl_sae"] / kl_tokens, rel=1e-3)
    assert found.kl_div_with_ablation == pytest.approx(sums["kl_zero"] / kl_tokens, rel=1e-3)
    cost = sums["zero"] - sums["clean"]
    assert found.ce_loss_score == pytest.approx((sums["zero"] - sums["sae"]) / cost, rel=1e-2)
    assert found.to_dict()["ce_loss_recovered"] == found.to_dict()["ce_loss_score"]


def test_figures_do_not_depend_on_the_batch(tiny_model: Any) -> None:
    whole, one = (in_model(tiny_model, model_sae(), batch_tokens=tokens).to_dict() for tokens in (10_000, 1))
    histograms = whole.pop("density_histogram"), one.pop("density_histogram")
    assert histograms[0] == histograms[1]
    names = {name: value for name, value in whole.items() if isinstance(value, float) and "score" not in name}
    assert {name: one[name] for name in names if name != "ce_loss_recovered"} == pytest.approx(
        {name: value for name, value in names.items() if name != "ce_loss_recovered"}, rel=1e-4
    )


def test_reconstruction_figures_are_those_of_the_same_rows_on_their_own(tiny_model: Any) -> None:
    batch = TokenBatch.of(texts(), torch.device("cpu"))
    rows = states(tiny_model, batch)[batch.content]
    for splice_at in ("content", "all"):
        found = in_model(tiny_model, model_sae(), splice_at=splice_at).reconstruction.to_dict()
        expected = on_rows(model_sae(), rows).to_dict()
        assert found.pop("density_histogram") == expected.pop("density_histogram")
        assert found == pytest.approx(expected, rel=1e-4)


def test_several_saes_at_once_are_measured_as_each_alone(tiny_model: Any) -> None:
    saes = {"x": model_sae(), "y": model_sae(seed=2), "z": model_sae(MLP), "skip": transcoder(tiny_model)}
    together = measure_quality(tiny_model, texts(), saes)
    for name, sae in saes.items():
        alone = measure_quality(tiny_model, texts(), {name: sae})[name]
        assert together[name].to_dict() == alone.to_dict()


def test_a_transcoder_replaces_its_output_by_what_it_makes_of_its_input(tiny_model: Any) -> None:
    sae, (sequence, *_) = transcoder(tiny_model), texts()
    found = measure_quality(tiny_model, [sequence], {"t": sae})["t"]
    assert found.hook_name_out == MLP
    ids = torch.tensor([sequence.ids])
    inputs: list[Tensor] = []
    block = tiny_model.model.layers[2]
    handles = [
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        block.mlp.register_forward_hook(lambda _, __, output: edit(output)),
    ]

    def edit(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[0, sequence.positions] = sae.reconstruct(inputs[0][0, sequence.positions])
        return changed

    logits = tiny_model(ids).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    known = [p for p in sequence.positions if p + 1 < len(sequence.ids)]
    expected = -np.mean([float(logits[p, sequence.ids[p + 1]]) for p in known])
    assert found.downstream is not None
    assert found.downstream.ce_loss_with_sae == pytest.approx(expected, rel=1e-5)


def test_a_lower_precision_model_and_sae_are_measured_in_single_precision(tiny_model: Any) -> None:
    expected = in_model(tiny_model, identity_sae()).downstream
    found = in_model(tiny_model.to(torch.bfloat16), identity_sae()).downstream
    assert found is not None
    assert expected is not None
    assert found.kl_div_with_sae == 0  # bfloat16 values survive the way through float32
    assert found.ce_loss_recovered == 1
    assert found.ce_loss_without_sae == pytest.approx(expected.ce_loss_without_sae, rel=0.01)


def test_progress_runs_to_its_end(tiny_model: Any) -> None:
    seen: list[tuple[int, int]] = []
    measure_quality(tiny_model, texts(), {"a": model_sae()}, batch_tokens=50, on_batch=lambda *p: seen.append(p))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert len({total for _, total in seen}) == 1


# What is refused, here and on activations


def test_an_sae_of_another_model_is_refused(tiny_model: Any) -> None:
    with pytest.raises(BankError, match=r"d_in.*8 is not the width 32 of blocks\.1\.hook_resid_post"):
        in_model(tiny_model, identity_sae(width=8))
    with pytest.raises(BankError, match="d_in"):
        on_rows(identity_sae(width=4), sparse_data(d_in=8))
    with pytest.raises(GuardError, match="layers 0 to 3"):
        in_model(tiny_model, identity_sae("blocks.9.hook_resid_post"))
    with pytest.raises(BankError, match="comes before its input"):
        in_model(tiny_model, transcoder(tiny_model, hook_name="blocks.3.hook_resid_pre"))
    encoder = SAE(**{**vars(model_sae()), "encoder_only": True})
    with pytest.raises(BankError, match="encoder without a decoder"):
        in_model(tiny_model, encoder)


def test_nothing_to_measure_is_an_error(tiny_model: Any) -> None:
    empty = TokenSequence(document=0, ids=[1, 5], positions=np.array([], dtype=np.int64))
    last = TokenSequence(document=0, ids=[1, 5], positions=np.array([1]))
    for sequences, saes, message in (
        ([], {"a": model_sae()}, "gives a token"),
        ([empty], {"a": model_sae()}, "gives a token"),
        ([last], {"a": model_sae()}, "two tokens in a row"),
        (texts(), {}, "no SAE"),
    ):
        with pytest.raises(DataError, match=message):
            measure_quality(tiny_model, sequences, saes)
    with pytest.raises(DataError, match="no activation"):
        measure_reconstruction({"a": random_sae()}, lambda: iter([]))


def test_activations_that_are_not_finite_are_refused(tiny_model: Any) -> None:
    rows = sparse_data(d_in=8)
    rows[17, 3] = torch.nan
    with pytest.raises(DataError, match="NaN or infinity"):
        on_rows(random_sae(), rows)
    tiny_model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(DataError, match=r"blocks\.1\.hook_resid_post.*NaN or infinity"):
        in_model(tiny_model, model_sae())
