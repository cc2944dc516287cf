"""Directions beside an SAE's features: what they separate, and that the SAE's own rows stay what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_bank.sae import SAE
from training.contrast import ContrastTexts, PairRows
from training.corpus import Document
from training.directions import concept_directions, document_means, domain_directions, with_directions
from training.selected import TrainedHook

D_IN = 12
rng = np.random.default_rng(0)


def document(i: int, split: str, *domains: str) -> Document:
    return Document(
        id=f"d{i}",
        text="t",
        role="prompt",
        domains=frozenset(domains),
        known=frozenset({"violence"}),
        source="a" if i % 2 else "b",
        licence="MIT",
        split=split,  # type: ignore[arg-type]  # a split's name
    )


@pytest.fixture
def labelled() -> tuple[np.ndarray, list[Document]]:
    """120 documents; violence moves the mean activation along the first axis, and noise is strong on the second."""
    documents = [
        document(i, "discovery" if i < 80 else "test", *(["violence"] if i % 3 == 0 else [])) for i in range(120)
    ]
    means = np.random.default_rng(1).normal(size=(120, D_IN)).astype(np.float32)
    means[:, 1] *= 20
    means[:, 0] += [4.0 if "violence" in d.domains else 0.0 for d in documents]
    return means, documents


def contrast() -> tuple[np.ndarray, ContrastTexts]:
    """Two concepts of eight pairs each: the one along axis 2, the other along axis 3."""
    texts, pairs, rows = [], [], []
    for c, name in enumerate(("assault", "threat")):
        for n in range(8):
            split = "train" if n < 6 else "test"
            base = np.random.default_rng(100 * c + n).normal(size=D_IN).astype(np.float32)
            moved = base.copy()
            moved[2 + c] += 12
            pairs.append(
                PairRows(
                    domain="violence", concept=name, lang="en", split=split, positive=len(rows), negative=len(rows) + 1
                )
            )
            rows += [moved, base]
            texts += [document(len(texts), "test", "violence"), document(len(texts) + 1, "test")]
    return np.stack(rows), ContrastTexts(documents=texts, pairs=pairs, hard=[])


def sae() -> SAE:
    generator = torch.Generator().manual_seed(3)
    return SAE(
        W_enc=torch.randn(D_IN, 20, generator=generator),
        W_dec=torch.randn(20, D_IN, generator=generator),
        b_enc=torch.randn(20, generator=generator),
        b_dec=torch.randn(D_IN, generator=generator),
        threshold=torch.rand(20, generator=generator),
        hook_name="blocks.1.hook_resid_post",
    )


def test_a_documents_mean_is_that_of_its_rows() -> None:
    activations = torch.randn(50, D_IN)
    documents = np.repeat([0, 2, 3], [20, 29, 1])
    means = document_means(activations, documents, 5)
    for document_ in (0, 2, 3):
        np.testing.assert_allclose(means[document_], activations[documents == document_].mean(0), rtol=1e-5, atol=1e-6)
    assert not means[[1, 4]].any()


def test_a_domains_direction_separates_documents_that_it_was_not_fitted_on(
    labelled: tuple[np.ndarray, list[Document]],
) -> None:
    means, documents = labelled
    found = domain_directions(means, documents)
    assert found.names == ("violence",)
    fires = means @ found.weight[:, 0] + found.bias[0] > 0
    truth = np.array(["violence" in d.domains for d in documents])
    assert (fires == truth)[80:].mean() > 0.9
    np.testing.assert_allclose(np.linalg.norm(found.weight, axis=0), 1, rtol=1e-5)


def test_labels_of_other_splits_do_not_move_it(labelled: tuple[np.ndarray, list[Document]]) -> None:
    means, documents = labelled
    before = domain_directions(means, documents)
    changed = means.copy()
    changed[80:] += 7
    np.testing.assert_array_equal(domain_directions(changed, documents).weight, before.weight)


def test_a_domain_with_few_labels_has_none(labelled: tuple[np.ndarray, list[Document]]) -> None:
    means, documents = labelled
    assert domain_directions(means[:40], documents[:40]).names == ()


def test_a_concepts_direction_finds_its_own_test_pairs_and_not_the_other_concepts() -> None:
    rows, texts = contrast()
    found = concept_directions(rng.normal(size=(200, D_IN)).astype(np.float32), rows, texts)
    assert found.names == ("violence/assault", "violence/threat")
    fires = rows @ found.weight + found.bias > 0
    for column, name in enumerate(("assault", "threat")):
        for pair in texts.pairs:
            if pair.split == "test":
                assert fires[pair.positive, column] == (pair.concept == name)
                assert not fires[pair.negative, column]


def test_test_pairs_do_not_move_it() -> None:
    rows, texts = contrast()
    corpus = rng.normal(size=(5000, D_IN)).astype(np.float32)
    before = concept_directions(corpus, rows, texts)
    changed = rows.copy()
    for pair in texts.pairs:
        if pair.split == "test":
            changed[pair.positive] += rng.normal(size=D_IN)
    after = concept_directions(corpus, changed, texts)
    assert (np.sum(before.weight * after.weight, axis=0) > 0.99).all()  # by the covariance alone, which has no labels


def test_the_saes_own_rows_encode_as_before_and_directions_come_after_them() -> None:
    rows, texts = contrast()
    part = concept_directions(rng.normal(size=(200, D_IN)).astype(np.float32), rows, texts)
    plain = sae()
    extended = with_directions(plain, [part])
    x = torch.randn(30, D_IN)
    acts = extended.encode(x)
    torch.testing.assert_close(acts[:, :20], plain.encode(x), atol=1e-5, rtol=1e-5)
    pre = x @ torch.from_numpy(part.weight) + torch.from_numpy(part.bias)
    torch.testing.assert_close(acts[:, 20:], pre.clamp_min(0), atol=1e-5, rtol=1e-5)
    hook = TrainedHook(sae=extended, sha256="0" * 64, k=4, fvu=0.1, l0=4.0, dead_fraction=0.0, directions=part.names)
    assert (hook.learnt, hook.direction(19), hook.direction(21)) == (20, "", "violence/threat")


def test_taking_a_direction_out_takes_it_to_where_it_stops_firing() -> None:
    rows, texts = contrast()
    part = concept_directions(rng.normal(size=(200, D_IN)).astype(np.float32), rows, texts)
    extended = with_directions(sae(), [part])
    x = torch.randn(30, D_IN)
    x[:, 2:4] += 9
    for index in (20, 21):
        active = extended.encode(x)[:, index]
        assert (active > 0).any()
        left = extended.encode(x - active[:, None] * extended.W_dec[index])[:, index]
        assert left.abs().max() < 1e-4
