"""Requests and responses of `/admin` as they stand on the wire."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from feature_bank.schema import Manifest
from feature_bank.versions import Event
from service.policies import MAX_POLICY, PolicyEvent

__all__ = [
    "BankPlace",
    "BankStatus",
    "BankVersion",
    "PolicyCheck",
    "PolicyRequest",
    "PolicyStatus",
    "PromoteBankRequest",
    "ReloadReport",
    "RollbackRequest",
]

VersionName = Annotated[str, Field(min_length=1, max_length=250)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromoteBankRequest(_Body):
    """Body of `POST /admin/bank/promote`."""

    version: VersionName = Field(description="A version that is in the store, or the beginning of its name.")


class RollbackRequest(_Body):
    """Body of the rollbacks; without one, or without `to`, the version before the current one is meant."""

    to: VersionName | None = Field(default=None, description="The version to go back to, or the beginning of its name.")


class PolicyRequest(_Body):
    """Body of `POST /admin/policy/validate` and `promote`."""

    yaml: str = Field(min_length=1, max_length=MAX_POLICY, description="A policy file's text.")


class ReloadReport(BaseModel):
    """What came of a reload; a refused one is answered with 409."""

    what: Literal["bank", "policy", "all"]
    result: Literal["ok", "refused", "unchanged"]
    reason: str
    bank: str | None
    policy: str | None
    previous_bank: str | None
    previous_policy: str | None
    problem: str | None
    time: str


class BankPlace(BaseModel):
    """Where the bank comes from."""

    kind: Literal["shipped", "folder", "store"]
    path: str


class BankVersion(BaseModel):
    """A version in the store; it is verified when it is switched to."""

    version: str
    current: bool
    since: str | None


class BankStatus(BaseModel):
    """The bank in use, and what could be used in its place."""

    version: str
    content_hash: str
    features: int
    domains: dict[str, int]
    manifest: Manifest
    place: BankPlace
    versions: list[BankVersion] | None
    history: list[Event]
    last_reload: ReloadReport | None


class PolicyStatus(BaseModel):
    """The policy in use, its file, and what the file held before."""

    name: str
    version: str
    on_error: Literal["block", "flag", "allow"]
    yaml: str = Field(description="The policy in use, with what it extends.")
    file: str | None
    source: str | None = Field(description="What the file holds now.")
    source_in_use: bool | None = Field(description="Whether that is the policy in use.")
    history: list[PolicyEvent]
    last_reload: ReloadReport | None


class PolicyCheck(BaseModel):
    """Whether a policy could be used with the bank in use."""

    valid: bool
    policy: str | None
    bank: str
    problem: str | None
