"""Text with features planted in it, whose explanations are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.taxonomy import Taxonomy
from feature_bank.taxonomy.records import Concept, DomainTaxonomy, HardNegative, Pair, Subtopic
from tests.training.samples import document
from training.corpus import OWN_SOURCE, Document, Split
from training.explain.segmented import SegmentedText, segment_text

WORDS = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(120)]
HOOK = "blocks.0.hook_resid_post"
SPLITS: tuple[Split, ...] = ("discovery", "discovery", "discovery", "calibration", "test")


class WordTokenizer:
    """Words with the space before them, marks, and Chinese characters: one token each."""

    all_special_ids: Sequence[int] = ()

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self._ids: dict[str, int] = {}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        found = re.findall(r" ?[A-Za-z0-9']+|[^A-Za-z0-9 ]| ", text)
        for piece in found:
            if piece not in self._ids:
                self._ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return {"input_ids": [self._ids[piece] for piece in found]}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def planted_documents(n: int = 400, extra: Callable[[int], str] = lambda _: "") -> list[Document]:
    """Sentences of random words; in some of them stand harbour, lantern or 选举. Every third is the project's own."""
    generator = np.random.default_rng(5)
    documents = []
    for i in range(n):
        sentences = []
        for _ in range(3):
            words = list(generator.choice(WORDS, 9))
            for word, share in (("harbour", 0.25), ("lantern", 0.2), ("选举投票", 0.15)):
                if generator.random() < share:
                    words.insert(int(generator.integers(1, 9)), word)
            sentences.append(" ".join(words))
        text = f"{i % 10} " + ". ".join(sentences) + "." + extra(i)
        source, split = (OWN_SOURCE if i % 3 == 0 else "elsewhere"), SPLITS[i % 5]
        documents.append(document(text, id=str(i), source=source, split=split, known=("politics",)))
    return documents


def cut(documents: Sequence[Document], tokenizer: Any) -> SegmentedText:
    """The documents as a harvest would hold them, segmented."""
    ids = [tokenizer(d.text)["input_ids"] for d in documents]
    return segment_text(
        np.array([t for row in ids for t in row]),
        np.repeat(np.arange(len(ids)), [len(row) for row in ids]),
        documents,
        tokenizer.decode,
    )


def firing_where(text: SegmentedText, *fires: Callable[[str], bool]) -> npt.NDArray[np.float16]:
    """(tokens, F): each feature is 0.8 on the tokens whose text, without space around it, it fires on."""
    columns = [[0.8 if rule(piece.strip()) else 0.0 for piece in text.texts] for rule in fires]
    return np.array(columns, dtype=np.float16).T.copy()


def noise(text: SegmentedText, n: int, share: float = 0.02, seed: int = 3) -> npt.NDArray[np.float16]:
    """(tokens, n): features that fire anywhere."""
    drawn = np.random.default_rng(seed).random((len(text.texts), n))
    return np.where(drawn < share, 0.8, 0.0).astype(np.float16)


def keys(n: int) -> list[tuple[str, int]]:
    return [(HOOK, i) for i in range(n)]


def small_taxonomy() -> Taxonomy:
    """One concept, whose words are ballot and turnout in English and 国会 in Chinese."""
    english = [
        ("The ballot was long and the day was cold.", "The parcel was long and the day was cold.", "train"),
        ("They argued about the turnout all night.", "They argued about the football all night.", "train"),
        ("A secretword about the poll was printed.", "A page about the garden was printed.", "test"),
    ]
    chinese = [("昨天的国会很安静。", "昨天的晚餐很安静。", "train")]
    pairs = [
        Pair.model_validate({"with": a, "without": b, "lang": lang, "genre": "news", "split": split})
        for lang, rows in (("en", english), ("zh", chinese))
        for a, b, split in rows
    ]
    hard = HardNegative(text="The choir met in the old hall.", lang="en", kind="everyday")
    definition = "What belongs to elections and what does not, at sufficient length."
    concept = Concept(id="votes", name="Votes", definition=definition, pairs=tuple(pairs), hard_negatives=(hard,))
    subtopic = Subtopic(id="elections", name="Elections", definition=definition, concepts=(concept,))
    return {"politics": DomainTaxonomy(domain="politics", subtopics=(subtopic,))}
