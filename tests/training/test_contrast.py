"""Contrast pairs as documents: complete, on the right side of the split, and fired on as the SAE says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import training.contrast
from feature_bank.errors import BankError, DataError
from feature_bank.taxonomy import DomainTaxonomy, Taxonomy, load_taxonomy
from tests.training.samples import random_sae
from training.contrast import ContrastTexts, firing, harvest_contrasts, taxonomy_texts
from training.corpus import OWN_SOURCE, tokenise

HOOKS = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")


def some_taxonomy() -> Taxonomy:
    """One domain with one concept: two pairs in English, one in Chinese, one hard negative."""
    pair = {"genre": "news", "lang": "en", "split": "train"}
    concept = {
        "id": "vote",
        "name": "Votes",
        "definition": "A vote of a parliament or of a people, as reported or discussed.",
        "pairs": [
            {**pair, "with": "The chamber voted.", "without": "The chamber sang."},
            {**pair, "with": "who won the election?", "without": "who won the raffle?", "genre": "chat"},
            {**pair, "with": "议会投票了。", "without": "议会唱歌了。", "lang": "zh", "split": "test"},
        ],
        "hard_negatives": [{"text": "We voted for pizza.", "lang": "en", "kind": "everyday"}],
    }
    text = "Something long enough to be a definition of it."
    subtopic = {"id": "elections", "name": "Elections", "definition": text, "concepts": [concept]}
    return {"politics": DomainTaxonomy.model_validate({"domain": "politics", "subtopics": [subtopic]})}


def harvested(model: Any, tokenizer: Any, texts: ContrastTexts, folder: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {"fingerprint": {"model": "tiny"}, "report": lambda *_: None, **options}
    return harvest_contrasts(model, tokenizer, texts, HOOKS, folder, **arguments)


def test_every_text_of_the_shipped_taxonomy_is_a_document_once_and_labelled_as_its_side() -> None:
    taxonomy = load_taxonomy()
    texts = taxonomy_texts(taxonomy)
    written = Counter(t for record in taxonomy.values() for concept in record.concepts for t in concept.texts())
    assert Counter(d.text for d in texts.documents) == written
    assert len({d.id for d in texts.documents}) == len(texts.documents)
    rows = sorted([row for pair in texts.pairs for row in (pair.positive, pair.negative)] + [h.row for h in texts.hard])
    assert rows == list(range(len(texts.documents)))
    for pair in texts.pairs:
        positive, negative = texts.documents[pair.positive], texts.documents[pair.negative]
        assert positive.label(pair.domain) is True
        assert negative.label(pair.domain) is False
        assert positive.role == negative.role
        assert positive.known == negative.known == {pair.domain}
        assert positive.split == negative.split == ("test" if pair.split == "test" else "discovery")
        assert positive.id.rpartition("/")[0] == negative.id.rpartition("/")[0]
    for hard in texts.hard:
        assert texts.documents[hard.row].label(hard.domain) is False
        assert texts.documents[hard.row].split == "discovery"
    assert {d.source for d in texts.documents} == {OWN_SOURCE}


def test_ids_roles_and_languages() -> None:
    texts = taxonomy_texts(some_taxonomy())
    place = "taxonomy:politics/vote"
    assert [d.id for d in texts.documents] == [
        f"{place}/en1/with",
        f"{place}/en1/without",
        f"{place}/en2/with",
        f"{place}/en2/without",
        f"{place}/zh1/with",
        f"{place}/zh1/without",
        f"{place}/en/hard1",
    ]
    assert [d.role for d in texts.documents] == ["passage"] * 2 + ["prompt"] * 2 + ["passage"] * 3
    english = taxonomy_texts(some_taxonomy(), languages=("en",))
    assert [pair.lang for pair in english.pairs] == ["en", "en"]
    assert len(english.documents) == 5


def test_a_domain_without_a_pair_in_the_languages_is_refused() -> None:
    with pytest.raises(DataError, match=r"politics.yaml: no contrast pair in fr"):
        taxonomy_texts(some_taxonomy(), languages=("fr",))


def test_the_harvest_is_read_back_and_another_one_is_not_taken_for_it(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = taxonomy_texts(some_taxonomy())
    said: list[tuple[Any, ...]] = []
    first = harvested(tiny_model, tiny_tokenizer, texts, tmp_path / "c", report=lambda *args: said.append(args))
    assert said
    assert said[-1][:3] == ("contrast pairs", 1, 1)
    assert set(first.documents.tolist()) == set(range(len(texts.documents)))
    monkeypatch.setattr("training.harvest._capture", lambda *_: pytest.fail("the model was run again"))
    again = harvested(tiny_model, tiny_tokenizer, texts, tmp_path / "c")
    assert torch.equal(again.activations(HOOKS[0]), first.activations(HOOKS[0]))
    with pytest.raises(DataError, match="other text"):
        harvested(tiny_model, tiny_tokenizer, taxonomy_texts(some_taxonomy(), languages=("en",)), tmp_path / "c")
    with pytest.raises(DataError, match="another model"):
        harvested(tiny_model, tiny_tokenizer, texts, tmp_path / "c", fingerprint={"model": "other"})


def test_a_text_is_fired_on_if_one_of_its_tokens_is(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    texts = taxonomy_texts(some_taxonomy())
    cache = harvested(tiny_model, tiny_tokenizer, texts, tmp_path / "c")
    sae = random_sae(d_in=32, d_sae=40, threshold=1.2)
    x = cache.activations(HOOKS[0])
    fired = firing(sae, x, cache.documents, len(texts.documents))
    acts = sae.encode(x.float()).numpy() > 0
    for row in range(len(texts.documents)):
        assert (fired[row] == acts[cache.documents == row].any(0)).all()
    assert fired.any()
    assert not fired.all()
    assert len(tokenise(texts.documents, tiny_tokenizer, max_tokens=512)) == len(texts.documents)


@pytest.mark.parametrize("k", [None, 3])
def test_firing_depends_neither_on_the_order_of_rows_nor_on_chunks(
    k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = replace(random_sae(), k=k)
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.normal(size=(60, 8)).astype(np.float32))
    documents = generator.integers(0, 7, 60)
    whole = firing(sae, x, documents, 9)
    assert not whole[7:].any()  # documents without rows
    order = generator.permutation(60)
    monkeypatch.setattr(training.contrast, "_CHUNK_VALUES", sae.d_sae * 7)
    assert (firing(sae, x[torch.from_numpy(order)], documents[order], 9) == whole).all()


def test_an_sae_of_another_width_is_refused() -> None:
    with pytest.raises(BankError, match="another model"):
        firing(random_sae(d_in=8), torch.zeros(3, 16), np.zeros(3, dtype=np.int64), 1)
