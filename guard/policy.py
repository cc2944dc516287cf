"""What to do about which score: rules by domain, in a YAML file or by default."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from feature_bank.schema import HeadRecord
from feature_bank.taxonomy import Domain
from guard.errors import PolicyError
from guard.events import Phase
from guard.policy_file import PolicyText, read_policy_text


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Threshold(_Section):
    """Exactly one of: a calibrated probability, a false-positive rate for which the bank holds a threshold, or, for a
    rule on a concept or a feature, an activation."""

    probability: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    fpr: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    activation: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    """Of a feature on the token, as a multiple of its 99.9th percentile; of a concept's features the largest."""

    @model_validator(mode="after")
    def _one(self) -> Threshold:
        if sum(value is not None for value in (self.probability, self.fpr, self.activation)) != 1:
            raise ValueError("give exactly one of 'probability', 'fpr' and 'activation'")
        return self

    def resolve(self, head: HeadRecord, *, streaming: bool = False) -> float:
        """As a probability, for the given head; `streaming` for responses that are judged token by token."""
        if self.probability is not None:
            return self.probability
        assert self.fpr is not None  # an activation is no probability
        key = f"{self.fpr:g}"
        known = head.streaming_thresholds if streaming else head.thresholds
        if key not in known:
            raise PolicyError(
                f"the bank holds no threshold for a false-positive rate of {key}; "
                f"it has {', '.join(sorted(known))}; use one of them, or 'probability'"
            )
        return known[key]


class Steer(_Section):
    """How to steer the features of the rule's domain or concept, or its feature, at every hook point of the bank.

    add: x += strength * sum_f delta_f * W_dec[f], with delta_f the bank's mean activation difference for a domain, and
    the feature's scale (its 99.9th percentile) for a concept or a feature; a negative strength moves away. clamp: each
    feature is set to `value` times its scale; ablate: clamp to 0. Clamp and ablate keep the SAE's error term.
    """

    op: Literal["add", "clamp", "ablate"] = "add"
    strength: Annotated[float, Field(ge=-10.0, le=10.0)] = -1.0
    value: Annotated[float, Field(ge=-10.0, le=10.0)] = 0.0


class Rule(_Section):
    """One condition and its action. Several rules for a domain escalate: the most severe that fires prevails."""

    domain: Domain | None = None
    concept: Annotated[str, Field(min_length=1)] | None = None
    """`DOMAIN/CONCEPT`: the bank's features that are tagged with it."""
    feature: Annotated[str, Field(pattern=r"^L\d+/\d+$")] | None = None
    """A feature's id, such as `L14/123`."""
    scope: tuple[Phase, ...] = Field(default=("prompt", "response"), min_length=1)
    threshold: Threshold
    evidence_tokens: Annotated[int, Field(ge=1, le=64)] | None = None
    """Consecutive tokens that must reach the threshold (fewer if the message is shorter) before the rule
    fires. None: the number with which the bank's thresholds were calibrated, for a domain, and otherwise 1."""
    action: Literal["flag", "steer", "block"]
    steer: Steer = Steer()
    name: str = ""

    @model_validator(mode="after")
    def _one_target(self) -> Rule:
        if sum(value is not None for value in (self.domain, self.concept, self.feature)) != 1:
            raise ValueError("give exactly one of 'domain', 'concept' and 'feature'")
        if (self.domain is None) != (self.threshold.activation is not None):
            raise ValueError(
                "a rule on a domain takes a threshold as 'probability' or 'fpr', one on a concept or a feature as "
                "'activation'"
            )
        return self

    @property
    def target(self) -> str:
        """The domain, concept or feature that the rule is about."""
        return self.domain or self.concept or self.feature or ""

    @property
    def label(self) -> str:
        """The name by which verdicts refer to the rule."""
        return self.name or f"{self.target}-{self.action}"


class Policy(_Section):
    """A named list of rules, the refusal text, and what happens when the guard itself fails."""

    name: str = "default"
    rules: tuple[Rule, ...]
    refusal: str = "I can't continue with this: the conversation was stopped by a safety policy."
    on_error: Literal["block", "flag", "allow"] = "block"
    allow: tuple[str, ...] = ()
    """Concepts, as `DOMAIN/CONCEPT`, that may be talked about: features that tell only these of a domain do not raise
    its score."""
    _text: PolicyText | None = PrivateAttr(default=None)
    """What it was read from, if it was read from a file."""

    @model_validator(mode="after")
    def _distinct(self) -> Policy:
        labels = [rule.label for rule in self.rules]
        for position, label in enumerate(labels):
            if labels.index(label) < position:
                raise ValueError(
                    f"rules {labels.index(label)} and {position} are both called {label!r}, and a verdict could not "
                    "say which of them fired; give each a 'name'"
                )
        return self

    @property
    def version(self) -> str:
        """Name and a short hash of the contents."""
        data = self.model_dump(mode="json")
        for rule in data["rules"]:  # a field that came later and is not used leaves a policy what it was
            for part, name in ((rule, "concept"), (rule, "feature"), (rule["threshold"], "activation")):
                if part[name] is None:
                    del part[name]
        if not self.allow:
            del data["allow"]
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
        return f"{self.name}+{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @classmethod
    def default(cls) -> Policy:
        """Politics only flags; the other domains block at one false positive in a hundred."""
        at = Threshold(fpr=0.01)
        return cls(
            rules=(
                Rule(domain="politics", threshold=at, action="flag"),
                *(Rule(domain=d, threshold=at, action="block") for d in _HARMFUL),
            )
        )

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file, or a shipped policy by name. Raises PolicyError naming file, line, column and field."""
        text = read_policy_text(path)
        try:
            policy = cls.model_validate(text.data)
        except ValidationError as e:
            errors = e.errors()  # a misspelt field is also one that is missing: the spelling is the cause
            first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
            field = ".".join(str(part) for part in first["loc"]) or "rules"
            reason = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
            raise PolicyError(f"{text.where(first['loc'])}, field {field!r}: {reason}") from e
        policy._text = text
        return policy

    def where(self, rule: Rule, *field: str) -> str:
        """Where a rule, or a field of it, stands: for the beginning of an error message."""
        number = next(i for i, known in enumerate(self.rules) if known is rule)
        name = f"rule {rule.label!r}" + (f", field {'.'.join(field)!r}" if field else "")
        return self.place(name, "rules", number, *field)

    def place(self, name: str, *field: str | int) -> str:
        """`name`, and before it where the field stands if the policy was read from a file."""
        return name if self._text is None else f"{self._text.where(field)}, {name}"


_HARMFUL: tuple[Domain, ...] = ("pornography", "violence", "terror")
