"""What the server is, what a key may do on it, and what it has counted, as they stand on the wire."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Abilities",
    "About",
    "AuditOfAbout",
    "BankOfAbout",
    "GuardTime",
    "LimitsOfAbout",
    "PolicyOfAbout",
    "RuleOfAbout",
    "Stats",
    "Thresholds",
    "TokenCounts",
]

ActionName = Literal["allow", "flag", "steer", "block"]


class _Shown(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class BankOfAbout(_Shown):
    """The bank in use."""

    version: str
    name: str
    content_hash: str
    features: int
    domains: dict[str, int]
    """How many of the features are tagged with each domain."""
    layers: list[int]
    concepts: list[str]
    """What its features are tagged with, as `DOMAIN/CONCEPT`."""
    ceiling: float
    """Activations are cut off here, in units of a feature's 99.9th percentile."""


class Thresholds(_Shown):
    """From where on a rule counts: a probability, or an activation for a rule on a concept or a feature.

    Nothing for a rule on several signals, whose target names their thresholds.
    """

    text: float | None
    """For text that lies there whole."""
    stream: float | None
    """For an answer that is judged while it is generated."""


class RuleOfAbout(_Shown):
    """One rule of the policy in use."""

    name: str
    target: str
    """A domain, concept or feature, or a condition in words."""
    action: ActionName
    scope: list[Literal["prompt", "response"]]
    thresholds: Thresholds
    evidence_tokens: int
    """Tokens in a row that have to reach the threshold."""


class PolicyOfAbout(_Shown):
    """The policy in use."""

    name: str
    version: str
    on_error: Literal["block", "flag", "allow"]
    rules: list[RuleOfAbout]


class Abilities(_Shown):
    """What the key that asks may do on this server, as it is set up now."""

    generate: bool
    trace: bool
    steer: bool
    compare: bool
    review: bool
    audit: bool
    mark: bool
    events: bool


class LimitsOfAbout(_Shown):
    """What the server's settings allow."""

    max_new_tokens: int
    max_input_tokens: int


class AuditOfAbout(_Shown):
    """Whether verdicts are kept, and the judged texts with them."""

    on: bool
    text: bool


class About(_Shown):
    """What this server is."""

    object: Literal["about"] = "about"
    version: str
    """Of sailguard."""
    model: str
    context_length: int
    bank: BankOfAbout
    policy: PolicyOfAbout
    domains: list[str]
    """In the order of every list of scores."""
    generates: bool
    """Whether this process answers chats."""
    proxy: bool
    """Whether another server answers them."""
    keys: bool
    """Whether requests need a key."""
    role: Literal["client", "reader", "admin"] | None
    key_id: str | None
    can: Abilities
    limits: LimitsOfAbout
    audit: AuditOfAbout


class TokenCounts(_Shown):
    """Tokens of answers."""

    observed: int
    generated: int


class GuardTime(_Shown):
    """Time that the guard has added to forward passes."""

    seconds: float
    steps: int
    """Passes."""
    mean_ms: float | None
    """Of one pass."""
    share: float | None
    """Of the passes' whole time; none where no answers are generated, or by an engine that does not tell."""


class Stats(_Shown):
    """What has been counted since the server started, by all of its processes."""

    object: Literal["stats"] = "stats"
    time: float
    """Of this answer, in seconds since 1970."""
    verdicts: dict[str, dict[str, int]]
    """By domain and action."""
    requests: dict[str, dict[str, int]]
    """Judged texts by phase and the strongest action."""
    errors: int
    """Of the guard itself."""
    tokens: TokenCounts
    coverage: float | None = Field(description="Observed of the generated tokens; nothing before the first one.")
    guard: GuardTime
    in_flight: int
    """Requests being served, this one included."""
    queued: int
    """Requests that wait for the model."""
    bank: str
    policy: str
