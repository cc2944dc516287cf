"""A small model, text that it can be trained on, and the run that makes a bank of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from feature_bank.bank import Bank
from feature_bank.identity import identify
from training.corpus import OWN_SOURCE
from training.pipeline import load_preset, train_bank

HOOKS = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
PRESET: dict[str, Any] = {
    "name": "tiny",
    "version": "1",
    "hook_points": list(HOOKS),
    "labelled_tokens": 60,
    "general_tokens": 40,
    "general_budget": 1500,
    "sae": {"expansion": 4, "k": 4, "batch_tokens": 256, "epochs": 1, "lr": 5e-3},
    "pooling": {"window": 32, "min_tokens": 8, "ceiling": 1.0, "evidence_tokens": 2},
    "candidates": 20,
    "described_per_head": 12,
    "described_for_steering": 3,
    "admission": {"min_corr": None},
    "features_per_head": 8,
    "steering_features": 2,
    "canary": "A small bird sang in the garden; nobody listened, 42 times.",
    "own_corpora": False,
}
SECRET, HELD_OUT = "Zarquon", "Vogsphere"  # words that stand only in text that may not be shown
POLITICS = ["BALLOT", "SENATE", "QUORUM", "TREATY", "DECREE", "LOBBY"]
OTHERS = ["river", "garden", "kettle", "window", "pillow", "bread"]


class Workshop(NamedTuple):
    """What a run needs, bound to one folder of inputs."""

    model: Any
    tokenizer: Any
    folder: Path
    data: list[Path]

    def write_preset(self, **changes: Any) -> Path:
        path = self.folder / "preset.yaml"
        path.write_text(yaml.safe_dump({**PRESET, "taxonomy": str(self.folder / "taxonomy"), **changes}))
        return path

    def train(self, out: Path, work: Path, report: Callable[..., None] | None = None, **preset: Any) -> Bank:
        return train_bank(
            model=self.model,
            tokenizer=self.tokenizer,
            identity=identify(self.model, self.tokenizer, "tiny"),
            preset=load_preset(str(self.write_preset(**preset))),
            data=self.data,
            out=out,
            work=work,
            report=report or (lambda *_: None),
        )


def write_taxonomy(folder: Path) -> None:
    """One domain, two concepts: each pair says the same with a word of politics and without."""
    folder.mkdir()
    concepts = []
    for number, words in enumerate((POLITICS[:3], POLITICS[3:])):
        pairs = [
            {
                "with": f"{words[i % 3]} {OTHERS[i % 6]} {i}",
                "without": f"{OTHERS[(i + 1) % 6]} {OTHERS[i % 6]} {i + 40 * (number + 1)}",
                "lang": "en",
                "genre": "news",
                "split": "test" if i % 4 == 3 else "train",
            }
            for i in range(12)
        ]
        concepts.append(
            {
                "id": f"words_{number}",
                "name": "Words",
                "definition": "Some of the words that stand for politics here, and nothing besides them.",
                "pairs": pairs,
                "hard_negatives": [{"text": f"{OTHERS[0]} {OTHERS[3]} {number}", "lang": "en", "kind": "everyday"}],
            }
        )
    subtopic = {"id": "all", "name": "All", "definition": concepts[0]["definition"], "concepts": concepts}
    (folder / "politics.yaml").write_text(yaml.safe_dump({"domain": "politics", "subtopics": [subtopic]}))


def rows() -> list[dict[str, Any]]:
    """Text about politics and about nothing, told apart by its words; a third of it may not be shown."""
    generator = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for i in range(160):
        positive = i % 2 == 0
        words = generator.choice(POLITICS if positive else OTHERS, 5).tolist()
        split = "test" if i % 8 < 2 else "fit"
        own = i % 6 < 4
        if split == "test" or not own:
            words.insert(2, HELD_OUT if own else SECRET)
        found.append(
            {
                "id": f"row-{i}",
                "text": " ".join(words),
                "role": ("prompt", "response", "passage")[i % 3],
                "domains": ["politics"] if positive else [],
                "known": ["politics"],
                "source": OWN_SOURCE if own else "elsewhere",
                "licence": "CC0-1.0",
                "split": split,
            }
        )
    return found


class Trained(NamedTuple):
    """A finished run and what it reported."""

    bank: Bank
    out: Path
    work: Path
    reports: list[tuple[str, int, int, str]]
