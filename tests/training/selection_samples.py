"""Pairs without text, features that fire on them at random, and a ranked SAE made of both."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from feature_bank.taxonomy import Domain
from tests.training.samples import document, random_sae
from training.contrast import BoolArray, ContrastTexts, PairRows
from training.ranking import Candidate, Ranked
from training.selection import DomainContrast

SIZES = {"politics": {"votes": 9, "parties": 7, "laws": 8}, "terror": {"attacks": 10, "plots": 6}}
D_SAE = 120


def make_texts(sizes: Mapping[str, Mapping[str, int]] = SIZES) -> ContrastTexts:
    """Pairs of the given numbers, by domain and concept; their texts say nothing."""
    texts = ContrastTexts(documents=[], pairs=[], hard=[])
    for domain, concepts in sizes.items():
        for concept, n in concepts.items():
            for number in range(n):
                row = len(texts.documents)
                texts.documents.extend(document(f"{domain}/{concept}/{number}/{side}") for side in ("with", "without"))
                texts.pairs.append(
                    PairRows(
                        domain=domain,  # type: ignore[arg-type]  # a key is a domain
                        concept=concept,
                        lang="en",
                        split="train",
                        positive=row,
                        negative=row + 1,
                    )
                )
    return texts


def random_firing(texts: ContrastTexts, *, seed: int = 0, density: float = 0.3, d_sae: int = D_SAE) -> BoolArray:
    """Features that fire on texts whatever side they are, some often and some seldom."""
    generator = np.random.default_rng(seed)
    return generator.random((len(texts.documents), d_sae)) < density * generator.random(d_sae)


def entry(figures: Mapping[Domain, DomainContrast], name: str = "sae", l0: float = 8.0, layer: int = 1) -> Ranked:
    hook = f"blocks.{layer}.hook_resid_post"
    candidate = Candidate(name=name, hook_name=hook, d_in=8, d_sae=D_SAE, load=random_sae)
    return Ranked(candidate=candidate, l0=l0, alive=D_SAE, domains=figures)
