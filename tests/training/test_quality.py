"""Figures of SAEs: definitions against plain formulas, independence of batching, and the figures of perfect and of
worthless SAEs, on activations and in the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_bank.errors import BankError, DataError
from feature_bank.sae import SAE
from guard.capture import truncated_forward
from guard.errors import GuardError
from tests.factories import hooks_of
from tests.training.samples import random_sae, sparse_data
from training.corpus import TokenSequence
from training.downstream import SaeQuality, measure_quality
from training.quality import DENSITY_EDGES, DensityHistogram, ReconstructionQuality, measure_reconstruction
from training.splicing import TokenBatch, content_logits, group_by_length, spliced

HOOK = "blocks.1.hook_resid_post"
MLP = "blocks.2.hook_mlp_out"
WIDTH = 32  # of the tiny model


def identity_sae(hook_name: str = HOOK, width: int = WIDTH) -> SAE:
    """Reconstructs everything: each direction has a feature for its positive and one for its negative side."""
    eye = torch.eye(width)
    return SAE(
        W_enc=torch.cat([eye, -eye], dim=1),
        W_dec=torch.cat([eye, -eye]),
        b_enc=torch.zeros(2 * width),
        b_dec=torch.zeros(width),
        threshold=torch.zeros(2 * width),
        hook_name=hook_name,
    )


def constant_sae(value: Tensor, hook_name: str = HOOK, **fields: Any) -> SAE:
    """Reconstructs the same vector everywhere; no feature ever fires."""
    width = len(value)
    return SAE(
        W_enc=torch.zeros(width, 5),
        W_dec=torch.zeros(5, width),
        b_enc=torch.zeros(5),
        b_dec=value,
        threshold=torch.zeros(5),
        hook_name=hook_name,
        **fields,
    )


def model_sae(hook_name: str = HOOK, seed: int = 1) -> SAE:
    """An SAE of the tiny model's width that reconstructs badly."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(64, WIDTH, generator=generator), dim=1)
    return SAE(
        W_enc=W_dec.T.contiguous(),
        W_dec=W_dec,
        b_enc=torch.zeros(64),
        b_dec=torch.zeros(WIDTH),
        threshold=torch.full((64,), 0.002),
        hook_name=hook_name,
    )


def texts(n: int = 9, seed: int = 5) -> list[TokenSequence]:
    """Token sequences of unequal length whose first token is special, as are a few others."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(n):
        ids = generator.integers(3, 260, int(generator.integers(3, 24))).tolist()
        positions = np.array([p for p in range(1, len(ids)) if generator.random() < 0.9 or p == 1])
        found.append(TokenSequence(document=index, ids=[1, *ids[1:]], positions=positions))
    return found


def on_rows(sae: SAE, rows: Tensor, chunk: int = 10_000) -> ReconstructionQuality:
    return measure_reconstruction({"a": sae}, lambda: ({sae.hook_name: part} for part in rows.split(chunk)))["a"]


def in_model(model: Any, sae: SAE, **options: Any) -> SaeQuality:
    return measure_quality(model, texts(), {"a": sae}, **options)["a"]


# Figures on activations


def test_figures_follow_their_definitions() -> None:
    x, sae = sparse_data(d_in=8), random_sae()
    found = on_rows(sae, x)
    x, acts, x_hat = x.double(), sae.encode(x).double(), sae.reconstruct(x).double()
    residual, variance = (x - x_hat).pow(2).sum(1), (x - x.mean(0)).pow(2).sum(1)
    expected = {
        "fvu": residual.sum() / variance.sum(),
        "explained_variance": 1 - residual.sum() / variance.sum(),
        "explained_variance_legacy": (1 - residual / variance).mean(),
        "mse": residual.mean(),
        "cossim": torch.cosine_similarity(x, x_hat).mean(),
        "l2_norm_in": x.norm(dim=1).mean(),
        "l2_norm_out": x_hat.norm(dim=1).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.pow(2).sum() / (x * x_hat).sum(),
        "l0": (acts != 0).sum(1).double().mean(),
        "l1": acts.sum(1).mean(),
        "frac_alive": (acts != 0).any(0).double().mean(),
        "freq_over_10_percent": ((acts != 0).double().mean(0) > 0.1).double().mean(),
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )
    assert found.tokens == 1024
    assert found.outlier_tokens == 0
    np.testing.assert_allclose(found.feature_density, (acts != 0).double().mean(0).numpy())


def test_a_worked_example_of_explained_variance() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0]])  # squared distances from the mean (1, 2): 5 and 5
    found = on_rows(constant_sae(torch.tensor([2.0, 0.0])), x)  # squared residuals: 0 and 20
    assert found.explained_variance == pytest.approx(1 - 20 / 10)
    assert found.explained_variance_legacy == pytest.approx(((1 - 0 / 5) + (1 - 20 / 5)) / 2)
    assert found.mse == pytest.approx(10)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1023])
def test_figures_do_not_depend_on_how_rows_are_cut(chunk: int) -> None:
    rows, sae = sparse_data(d_in=8), random_sae()
    whole, cut = on_rows(sae, rows), on_rows(sae, rows, chunk)
    np.testing.assert_array_equal(cut.feature_density, whole.feature_density)
    a, b = whole.to_dict(), cut.to_dict()
    assert a.pop("density_histogram") == b.pop("density_histogram")
    assert b == pytest.approx(a, rel=1e-6)


def test_memory_is_bounded_by_the_dictionary_not_by_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    sae = random_sae()
    monkeypatch.setattr("training.quality._CHUNK_VALUES", 24 * 10)
    encode = SAE.encode

    def watched(self: SAE, sae_in: Tensor) -> Tensor:
        seen.append(len(sae_in))
        return encode(self, sae_in)

    monkeypatch.setattr(SAE, "encode", watched)
    on_rows(sae, sparse_data(d_in=8))
    assert max(seen) == 10
    assert sum(seen) == 1024


def test_a_perfect_sae_explains_everything() -> None:
    found = on_rows(identity_sae(width=8), sparse_data(d_in=8))
    assert (found.fvu, found.mse) == (0.0, 0.0)
    assert (found.explained_variance, found.explained_variance_legacy) == (1.0, 1.0)
    assert found.cossim == pytest.approx(1)
    assert found.l2_ratio == pytest.approx(1)
    assert found.relative_reconstruction_bias == pytest.approx(1)
    assert found.l0 == pytest.approx(8)


def test_predicting_the_mean_explains_nothing_and_predicting_zero_less() -> None:
    rows = sparse_data(d_in=8)
    mean = on_rows(constant_sae(rows.mean(0)), rows)
    assert mean.explained_variance == pytest.approx(0, abs=1e-6)
    zero = on_rows(constant_sae(torch.zeros(8)), rows)
    assert zero.explained_variance is not None
    assert zero.explained_variance < 0
    assert zero.relative_reconstruction_bias is None
    assert (zero.cossim, zero.l2_ratio, zero.l0, zero.l1) == (0, 0, 0, 0)
    assert (zero.frac_alive, zero.dead_fraction) == (0, 1)


def test_a_shrunken_reconstruction_shows_as_shrinkage() -> None:
    sae = identity_sae(width=8)
    half = SAE(**{**vars(sae), "W_dec": sae.W_dec / 2})
    found = on_rows(half, sparse_data(d_in=8))
    assert found.l2_ratio == pytest.approx(0.5)
    assert found.relative_reconstruction_bias == pytest.approx(0.5)
    assert found.cossim == pytest.approx(1)


def test_what_rows_cannot_show_is_none_and_valid_json() -> None:
    rows = torch.ones(4, 8)  # no variance
    found = on_rows(constant_sae(torch.zeros(8)), rows)
    assert (found.fvu, found.explained_variance, found.explained_variance_legacy) == (None, None, None)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["fvu"] is None
    assert plain["density_histogram"]["dead"] == 5
    assert "feature_density" not in plain


def test_attention_sinks_are_left_out_and_counted() -> None:
    rows, sae = sparse_data(d_in=8), random_sae()
    plain = on_rows(sae, rows).to_dict()
    with_sinks = torch.cat([rows[:500], 1000 * rows[:3], rows[500:], 1000 * rows[3:4]])
    found = on_rows(sae, with_sinks).to_dict()
    assert found.pop("outlier_tokens") == 4
    assert plain.pop("outlier_tokens") == 0
    histogram = found.pop("density_histogram"), plain.pop("density_histogram")
    assert histogram[0] == histogram[1]
    assert found == pytest.approx(plain, rel=1e-5)


def test_a_transcoder_is_measured_against_its_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    skip = torch.randn(8, 6, generator=generator)
    offset = torch.randn(6, generator=generator)
    transcoder = SAE(
        W_enc=torch.zeros(8, 5),
        W_dec=torch.zeros(5, 6),
        b_enc=torch.zeros(5),
        b_dec=offset,
        threshold=torch.zeros(5),
        hook_name="blocks.0.hook_resid_pre",
        hook_name_out="blocks.0.hook_mlp_out",
        apply_b_dec_to_input=False,
        W_skip=skip,
    )
    rows = {"blocks.0.hook_resid_pre": x, "blocks.0.hook_mlp_out": x @ skip + offset}
    found = measure_reconstruction({"t": transcoder}, lambda: iter([rows]))["t"]
    assert found.fvu == pytest.approx(0, abs=1e-10)
    assert found.l0 == 0
    with pytest.raises(DataError, match=r"blocks\.0\.hook_mlp_out"):
        measure_reconstruction({"t": transcoder}, lambda: iter([{"blocks.0.hook_resid_pre": x}]))


# The density histogram


@pytest.mark.parametrize("seed", range(4))
def test_the_histogram_holds_every_feature_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    density = generator.random(500) ** generator.integers(1, 12, 500)
    density[generator.random(500) < 0.2] = 0
    density[:3] = 1.0, 1e-8, 1e-12
    found = DensityHistogram.of(density)
    assert sum(found.counts) + found.dead == 500
    assert found.dead == (density == 0).sum()
    assert len(found.counts) == len(DENSITY_EDGES) - 1


def test_the_histogram_of_a_measured_sae_sums_to_d_sae_and_densities_to_l0() -> None:
    found = on_rows(random_sae(threshold=15.0), sparse_data(d_in=8))
    assert 0 < found.density_histogram.dead < 24
    assert sum(found.density_histogram.counts) + found.density_histogram.dead == 24
    assert found.feature_density.sum() == pytest.approx(found.l0)
    assert found.dead_fraction == pytest.approx(found.density_histogram.dead / 24)


def test_a_density_lies_in_the_bin_of_its_power_of_ten() -> None:
    found = DensityHistogram.of(np.array([1.0, 0.1, 0.001]))
    assert [DENSITY_EDGES[i] for i, n in enumerate(found.counts) if n] == [-3.0, -1.0, -0.25]


# In the model


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


def transcoder(model: Any, hook_name: str = "blocks.2.hook_resid_pre", hook_name_out: str = MLP) -> SAE:
    generator = torch.Generator().manual_seed(3)
    return SAE(
        W_enc=torch.randn(WIDTH, 48, generator=generator),
        W_dec=torch.randn(48, WIDTH, generator=generator),
        b_enc=torch.zeros(48),
        b_dec=torch.zeros(WIDTH),
        threshold=torch.zeros(48),
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        apply_b_dec_to_input=False,
        W_skip=torch.zeros(WIDTH, WIDTH),
    )


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


def test_special_and_padding_positions_neither_count_nor_change(tiny_model: Any) -> None:
    batch = TokenBatch.of(texts(), torch.device("cpu"))
    next_block = "blocks.2.hook_resid_pre"
    before = truncated_forward(tiny_model, [next_block], batch.ids, batch.mask)[next_block]
    values = torch.full((int(batch.content.sum()), WIDTH), 7.0)
    with spliced(tiny_model, HOOK, batch.content, values):
        after = truncated_forward(tiny_model, [next_block], batch.ids, batch.mask)[next_block]
    assert torch.equal(after[~batch.content], before[~batch.content])
    assert bool((after[batch.content] == 7.0).all())
    assert not bool((batch.content & ~batch.mask.bool()).any())
    assert not bool(batch.content[:, 0].any())


# What must not happen


def test_the_model_is_bit_for_bit_what_it_was(tiny_model: Any) -> None:
    batch = TokenBatch.of(texts(), torch.device("cpu"))
    before, weights = content_logits(tiny_model, batch), [p.clone() for p in tiny_model.parameters()]
    measure_quality(tiny_model, texts(), {"a": model_sae(), "t": transcoder(tiny_model)})
    assert hooks_of(tiny_model) == 0
    assert torch.equal(content_logits(tiny_model, batch), before)
    assert all(torch.equal(now, then) for now, then in zip(tiny_model.parameters(), weights, strict=True))


@pytest.mark.parametrize("moment", ["inside", "forward", "measuring"])
def test_the_model_is_what_it_was_after_an_exception(
    tiny_model: Any, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = TokenBatch.of(texts(), torch.device("cpu"))
    before = content_logits(tiny_model, batch)
    good = torch.zeros(int(batch.content.sum()), WIDTH)
    if moment == "inside":
        with pytest.raises(KeyboardInterrupt), spliced(tiny_model, HOOK, batch.content, good):
            raise KeyboardInterrupt
    elif moment == "forward":
        with pytest.raises(RuntimeError), spliced(tiny_model, HOOK, batch.content, good[1:]):
            content_logits(tiny_model, batch)
    else:

        def fail(*_: Any) -> Iterator[None]:
            raise MemoryError

        monkeypatch.setattr(SAE, "encode", fail)
        with pytest.raises(MemoryError):
            in_model(tiny_model, model_sae())
    assert hooks_of(tiny_model) == 0
    assert torch.equal(content_logits(tiny_model, batch), before)


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


def test_groups_hold_every_sequence_once_within_the_limit() -> None:
    sequences = texts(30)
    groups = group_by_length(sequences, batch_tokens=60)
    assert sorted(s.document for group in groups for s in group) == list(range(30))
    assert all(len(g) * max(len(s.ids) for s in g) <= 60 for g in groups)
    assert len(groups) < 30


def test_progress_runs_to_its_end(tiny_model: Any) -> None:
    seen: list[tuple[int, int]] = []
    measure_quality(tiny_model, texts(), {"a": model_sae()}, batch_tokens=50, on_batch=lambda *p: seen.append(p))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert len({total for _, total in seen}) == 1
