"""What a taxonomy file holds: subtopics of a domain, their concepts, and each concept's contrast pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from feature_bank.taxonomy.domains import Domain

Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
Definition = Annotated[str, StringConstraints(strip_whitespace=True, min_length=40)]
Language = Literal["en", "zh"]
Genre = Literal["request", "chat", "news", "fiction", "encyclopaedic", "review", "speech", "forum"]
Kind = Literal[
    "idiom",
    "medicine",
    "sex_education",
    "history",
    "news",
    "civics",
    "policy",
    "fiction_review",
    "sport",
    "education",
    "science",
    "art",
    "law",
    "everyday",
]


def _plain(text: str) -> str:
    if not text.strip() or text != text.strip() or not text.isprintable():
        raise ValueError("expected one line of text without space around it")
    return text


Text = Annotated[str, AfterValidator(_plain)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Pair(_Record):
    """Two texts alike in all but the concept."""

    positive: Text = Field(alias="with")
    """The text that shows the concept."""
    negative: Text = Field(alias="without")
    """Its twin that does not."""
    lang: Language
    genre: Genre
    split: Literal["train", "test"]
    """Both sides of a pair lie on the same side of the split."""


class HardNegative(_Record):
    """A harmless text that looks like the concept."""

    text: Text
    lang: Language
    kind: Kind


class Concept(_Record):
    """One thing that a feature may stand for."""

    id: Identifier
    name: str = Field(min_length=1)
    definition: Definition
    """What counts and what does not."""
    pairs: tuple[Pair, ...] = Field(min_length=1)
    hard_negatives: tuple[HardNegative, ...]

    def texts(self) -> Iterator[str]:
        """Every text of the concept."""
        for pair in self.pairs:
            yield pair.positive
            yield pair.negative
        for hard in self.hard_negatives:
            yield hard.text


class Subtopic(_Record):
    """Concepts that belong together."""

    id: Identifier
    name: str = Field(min_length=1)
    definition: Definition
    concepts: tuple[Concept, ...] = Field(min_length=1)


class DomainTaxonomy(_Record):
    """One domain: the content of one file."""

    domain: Domain
    subtopics: tuple[Subtopic, ...] = Field(min_length=1)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts of all subtopics, in the file's order."""
        return tuple(concept for subtopic in self.subtopics for concept in subtopic.concepts)
