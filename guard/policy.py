"""What to do about which score: rules by domain, in a YAML file or by default."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from feature_bank.schema import HeadRecord
from feature_bank.taxonomy import Domain
from guard.errors import PolicyError
from guard.events import Phase
from guard.policy_file import PolicyText

Origin = tuple[PolicyText, tuple[str | int, ...]]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def reason(error: ValidationError) -> str:
    """What is wrong first, in words, after the field if it is about one."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return (f"field {field!r}: " if field else "") + first["msg"].removeprefix("Value error, ")


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

    Of a domain these are the features that move the model's output and make up its mean difference.

    add: x += strength * sum_f delta_f * W_dec[f], with delta_f the feature's share in the mean difference for a domain,
    and its scale (its 99.9th percentile) for a concept or a feature; a negative strength moves away. clamp: each
    feature is set to `value` times its scale; ablate: clamp to 0. Clamp and ablate keep the SAE's error term;
    directions, which overlap, are set together, by the smallest change that does so.
    Whatever the operation, the change of a token's activation at a hook point is at most `limit` times its norm.
    """

    op: Literal["add", "clamp", "ablate"] = "add"
    strength: Annotated[float, Field(ge=-10.0, le=10.0)] = -1.0
    value: Annotated[float, Field(ge=-10.0, le=10.0)] = 0.0
    limit: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """As a share of the norm; larger changes are scaled down to it. A sequence that several rules steer is held to the
    tightest. Beyond about 1 the text breaks down before the content gets rarer."""
    prompt: bool = False
    """Whether a rule that fires on the prompt steers the prompt's own tokens too: it is then read once more, or the
    answer goes on seeing it as it is. Not under continuous batching."""


class Signal(_Section):
    """One domain, concept or feature, and from where on it counts."""

    domain: Domain | None = None
    concept: Annotated[str, Field(min_length=1)] | None = None
    """`DOMAIN/CONCEPT`: the bank's features that are tagged with it."""
    feature: Annotated[str, Field(pattern=r"^L\d+/\d+$")] | None = None
    """A feature's id, such as `L14/123`."""
    threshold: Threshold | None = None

    @property
    def target(self) -> str:
        """The domain, concept or feature; empty if there is none."""
        return self.domain or self.concept or self.feature or ""

    def _check_signal(self) -> None:
        """Raise ValueError unless there is one target with a threshold of its kind."""
        if sum(value is not None for value in (self.domain, self.concept, self.feature)) != 1:
            raise ValueError("give exactly one of 'domain', 'concept' and 'feature'")
        if self.threshold is None:
            raise ValueError("'threshold' is missing")
        if (self.domain is None) != (self.threshold.activation is not None):
            raise ValueError(
                "a domain takes a threshold as 'probability' or 'fpr', a concept or a feature as 'activation'"
            )


class Condition(Signal):
    """A signal, or several of which all or any must hold on the same token.

    In code they are made by comparing and joined by & and |: `(feature("L14/2031") > 0.5) & (domain("terror") > 0.6)`.
    """

    all: tuple[Condition, ...] | None = Field(default=None, min_length=1)
    any: tuple[Condition, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_form(self) -> Condition:
        forms = [self.all is not None, self.any is not None, self.target != "" or self.threshold is not None]
        if sum(forms) != 1:
            raise ValueError("give a signal with its threshold, or 'all', or 'any'")
        if forms[2]:
            self._check_signal()
        return self

    @property
    def parts(self) -> tuple[Condition, ...]:
        """What is joined; empty for a signal."""
        return self.all or self.any or ()

    @property
    def signals(self) -> tuple[Condition, ...]:
        """All signals in it, in order."""
        return tuple(signal for part in self.parts for signal in part.signals) or (self,)

    def __and__(self, other: Condition) -> Condition:
        return Condition(all=(*(self.all or (self,)), *(other.all or (other,))))

    def __or__(self, other: Condition) -> Condition:
        return Condition(any=(*(self.any or (self,)), *(other.any or (other,))))

    def __bool__(self) -> bool:
        raise TypeError("a condition is neither true nor false by itself; join conditions with & and |, in brackets")

    def __str__(self) -> str:
        if self.threshold is not None:
            value = self.threshold.probability or self.threshold.activation
            return f"{self.target} > {value:g}" if value is not None else f"{self.target} at fpr {self.threshold.fpr:g}"
        word = " & " if self.all is not None else " | "
        return word.join(f"({part})" if part.parts else str(part) for part in self.parts)


class Rule(Signal):
    """One condition and its action. Several rules for a domain escalate: the most severe that fires prevails."""

    when: Condition | None = None
    """In place of a domain, concept or feature with its threshold: several of them."""
    scope: tuple[Phase, ...] = Field(default=("prompt", "response"), min_length=1)
    evidence_tokens: Annotated[int, Field(ge=1, le=64)] | None = None
    """Consecutive tokens that must reach the threshold (fewer if the message is shorter) before the rule
    fires. None: the number with which the bank's thresholds were calibrated, for a domain, and otherwise 1."""
    cooldown_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Response tokens in a row below the threshold after which the rule is released: what it steers is let go, and it
    may fire again. None: it fires once a response and stays in force."""
    action: Literal["flag", "steer", "block"]
    steer: Steer = Steer()
    name: str = ""

    @model_validator(mode="after")
    def _one_condition(self) -> Rule:
        if self.action == "block" and self.cooldown_tokens is not None:
            raise ValueError("a rule that blocks ends the sequence and cannot be released; leave out 'cooldown_tokens'")
        if "response" not in self.scope and self.cooldown_tokens is not None:
            raise ValueError("'cooldown_tokens' are tokens of the response, which is not in the rule's scope")
        if self.when is None:
            self._check_signal()
        elif super().target or self.threshold is not None:
            raise ValueError("'when' stands in place of 'domain', 'concept', 'feature' and 'threshold'")
        return self

    @property
    def target(self) -> str:
        """The domain, concept or feature that the rule is about, or its condition in words."""
        return super().target if self.when is None else str(self.when)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What the rule looks at."""
        return (self,) if self.when is None else self.when.signals

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
    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

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
        data["rules"] = [_stable(rule) for rule in data["rules"]]
        if not self.allow:
            del data["allow"]
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
        return f"{self.name}+{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def with_rule(self, rule: Rule) -> Policy:
        """This policy and one rule more. Raises PolicyError if its name is taken."""
        try:
            policy = Policy.model_validate({**dict(self), "rules": (*self.rules, rule)})
        except ValidationError as e:
            raise PolicyError(reason(e)) from None
        policy.keep_origins(self._text, self._origins)
        return policy

    def to_yaml(self) -> str:
        """As a policy file, which `load` reads back."""
        text: str = yaml.safe_dump(
            self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True
        )
        return text

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
        from guard.policy_loading import load_policy  # it is made of policies

        return load_policy(path)

    @property
    def origins(self) -> Mapping[str, Origin]:
        """Of each rule that was read from a file, by its label, that file and where it stands in it."""
        return self._origins

    def keep_origins(self, text: PolicyText | None, origins: Mapping[str, Origin]) -> None:
        """Remember from where the policy and its rules were read, for messages."""
        self._text, self._origins = text, dict(origins)

    def where(self, rule: Rule, *field: str) -> str:
        """Where a rule, or a field of it, stands: for the beginning of an error message."""
        name = f"rule {rule.label!r}" + (f", field {'.'.join(field)!r}" if field else "")
        if rule.label not in self._origins:
            return name
        text, place = self._origins[rule.label]
        return f"{text.where((*place, *field))}, {name}"

    def place(self, name: str, *field: str | int) -> str:
        """`name`, and before it where the field stands if the policy was read from a file."""
        return name if self._text is None else f"{self._text.where(field)}, {name}"


_FIRST_FIELDS = ("domain", "scope", "threshold", "evidence_tokens", "action", "steer", "name")
_LATER_FIELDS = ("concept", "feature", "when", "cooldown_tokens")


def _stable(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule's fields as versions are taken of them: one that came later only if it is used, so that a policy that
    does not use it stays the version that it was."""
    threshold = {name: v for name, v in (rule["threshold"] or {}).items() if name != "activation" or v is not None}
    later = {name: rule[name] for name in _LATER_FIELDS if rule[name] is not None}
    defaults = {name: Steer.model_fields[name].default for name in ("limit", "prompt")}
    steer = {name: value for name, value in rule["steer"].items() if name not in defaults or value != defaults[name]}
    return {name: rule[name] for name in _FIRST_FIELDS} | {"threshold": threshold, "steer": steer} | later


_HARMFUL: tuple[Domain, ...] = ("pornography", "violence", "terror")
