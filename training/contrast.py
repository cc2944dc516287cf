"""The taxonomy's pairs and hard negatives as documents, their activations, and which features fire on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.errors import BankError, DataError
from feature_bank.layout import Role
from feature_bank.sae import SAE
from feature_bank.taxonomy import Concept, Domain, Taxonomy
from training.corpus import OWN_SOURCE, Document, tokenise
from training.harvest import Harvest, harvest
from training.sweep import Reporter

LICENCE = "Apache-2.0"
LANGUAGES = ("en", "zh")
MAX_TOKENS = 512
_AS_PROMPT = frozenset({"request", "chat"})  # genres that a user would send; the others are read as passages
_CHUNK_VALUES = 2**23  # feature activations held at a time: 32 MB

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """One contrast pair, as rows of `ContrastTexts.documents`."""

    domain: Domain
    concept: str
    lang: str
    split: Literal["train", "test"]
    positive: int
    negative: int


class HardRow(NamedTuple):
    """One hard negative, as a row of `ContrastTexts.documents`."""

    domain: Domain
    concept: str
    row: int


@dataclass(frozen=True, kw_only=True)
class ContrastTexts:
    """Every text of a taxonomy as a document, and what belongs together."""

    documents: list[Document]
    """`split` is "test" for the taxonomy's test pairs, else "discovery"."""
    pairs: list[PairRows]
    hard: list[HardRow]


def taxonomy_texts(taxonomy: Taxonomy, *, languages: Sequence[str] = LANGUAGES) -> ContrastTexts:
    """The pairs and hard negatives of the given languages as documents.

    Requests and chats are read as a user's prompt, all else as a passage. Ids are
    `taxonomy:DOMAIN/CONCEPT/LANGN/with`, `.../LANGN/without` and `taxonomy:DOMAIN/CONCEPT/LANG/hardN`, numbered from 1.

    Raises DataError if a domain has no pair in these languages: there would be no text that shows it.
    """
    texts = ContrastTexts(documents=[], pairs=[], hard=[])
    for domain, record in taxonomy.items():
        before = len(texts.pairs)
        for concept in record.concepts:
            _add(texts, domain, concept, languages)
        if len(texts.pairs) == before:
            raise DataError(f"{domain}.yaml: no contrast pair in {', '.join(languages)}; nothing shows the domain")
    return texts


def choose_pairs(
    texts: ContrastTexts, *, languages: Sequence[str] = LANGUAGES, splits: Sequence[str] = ("train", "test")
) -> ContrastTexts:
    """The same documents with only the pairs of the given languages and sides of the taxonomy's split.

    Raises DataError if a domain that had pairs is left without any.
    """
    pairs = [p for p in texts.pairs if p.lang in languages and p.split in splits]
    for domain in dict.fromkeys(p.domain for p in texts.pairs):
        if not any(p.domain == domain for p in pairs):
            raise DataError(
                f"{domain}.yaml: no contrast pair in {' or '.join(languages)} with split {' or '.join(splits)}; "
                "nothing shows the domain"
            )
    return replace(texts, pairs=pairs)


def _add(texts: ContrastTexts, domain: Domain, concept: Concept, languages: Sequence[str]) -> None:
    place = f"taxonomy:{domain}/{concept.id}"
    numbers: Counter[str] = Counter()
    for pair in concept.pairs:
        if pair.lang not in languages:
            continue
        numbers[pair.lang] += 1
        name = f"{place}/{pair.lang}{numbers[pair.lang]}"
        role: Role = "prompt" if pair.genre in _AS_PROMPT else "passage"
        positive = len(texts.documents)
        for side, text in (("with", pair.positive), ("without", pair.negative)):
            texts.documents.append(
                _document(f"{name}/{side}", text, role, domain, present=side == "with", test=pair.split == "test")
            )
        texts.pairs.append(
            PairRows(
                domain=domain,
                concept=concept.id,
                lang=pair.lang,
                split=pair.split,
                positive=positive,
                negative=positive + 1,
            )
        )
    numbers.clear()
    for hard in concept.hard_negatives:
        if hard.lang in languages:
            numbers[hard.lang] += 1
            texts.hard.append(HardRow(domain, concept.id, len(texts.documents)))
            name = f"{place}/{hard.lang}/hard{numbers[hard.lang]}"
            texts.documents.append(_document(name, hard.text, "passage", domain, present=False, test=False))


def _document(name: str, text: str, role: Role, domain: Domain, *, present: bool, test: bool) -> Document:
    return Document(
        id=name,
        text=text,
        role=role,
        domains=frozenset({domain} if present else ()),
        known=frozenset({domain}),
        source=OWN_SOURCE,
        licence=LICENCE,
        split="test" if test else "discovery",
    )


def harvest_contrasts(
    model: Any,
    tokenizer: Any,
    texts: ContrastTexts,
    hook_points: Sequence[str],
    folder: Path,
    *,
    fingerprint: Mapping[str, Any],
    report: Reporter,
) -> Harvest:
    """The activations of all `texts` at the hook points, kept in `folder` and read back from there the next time.

    fingerprint: what they depend on besides texts and weights (model, tokenizer). The harvest's documents are rows of
    `texts.documents`.

    Raises DataError as `harvest` does, also if `folder` holds the activations of other texts or another model.
    """
    return harvest(
        model,
        tokenise(texts.documents, tokenizer, max_tokens=MAX_TOKENS),
        hook_points,
        folder,
        fingerprint=dict(fingerprint),
        on_shard=lambda done, total, tokens: report("contrast pairs", done, total, f"{tokens:,} tokens"),
    )


class Firing(NamedTuple):
    """What an SAE does on documents."""

    fired: BoolArray
    """(n_documents, d_sae): whether each feature fires on any token of each document."""
    l0: float
    """Mean number of features that fire on a token."""


def measure_firing(
    sae: SAE, activations: Float[Tensor, "tokens d_in"], documents: npt.NDArray[np.int64], n_documents: int
) -> Firing:
    """Which features fire on which documents, and on how many of a token.

    documents: (tokens,) the document of every row, in any order. A document without rows fires nothing. Besides the
    result, one byte an entry, at most 32 MB of feature activations are held.

    Raises BankError if the SAE is of another width than the activations.
    """
    if sae.d_in != activations.shape[1]:
        raise BankError(
            f"{sae.d_in} is not the width {activations.shape[1]} of {sae.hook_name}; is it an SAE of another model?",
            field="d_in",
        )
    fired = np.zeros((n_documents, sae.d_sae), dtype=np.bool_)
    step = max(1, _CHUNK_VALUES // sae.d_sae)
    active = 0
    for start in range(0, len(activations), step):
        acts = sae.encode(activations[start : start + step].to(sae.W_enc.device, torch.float32))
        rows, features = (index.cpu().numpy() for index in torch.nonzero(acts, as_tuple=True))
        fired[documents[start : start + step][rows], features] = True
        active += len(rows)
    return Firing(fired, active / max(len(activations), 1))


def firing(
    sae: SAE, activations: Float[Tensor, "tokens d_in"], documents: npt.NDArray[np.int64], n_documents: int
) -> BoolArray:
    """(n_documents, d_sae): whether each feature fires on any token of each document. See `measure_firing`."""
    return measure_firing(sae, activations, documents, n_documents).fired


def inlier_rows(cache: Harvest, hook_name: str) -> BoolArray:
    """(tokens,) which rows are no attention sinks, on which no SAE was trained and thousands of features fire."""
    kept = np.ones(cache.tokens, dtype=np.bool_)
    kept[cache.outliers(hook_name)] = False
    return kept
