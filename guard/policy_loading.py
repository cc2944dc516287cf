"""From a policy file to the policy that it means: alone, or laid over another one that it extends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from guard.errors import PolicyError
from guard.policy import Origin, Policy, Rule
from guard.policy_file import PolicyText, read_policy_text, shipped_policies

MAX_DEPTH = 8  # files of which each extends the next


class PolicyFile(Policy):
    """What a policy file may hold: a policy, or what differs from another one."""

    rules: tuple[Rule, ...] = ()
    extends: str | None = None
    """A policy file, relative to this one, or a shipped policy's name: what is not given here is taken from there. A
    rule with the name of one of its rules takes that one's place; the others are added."""
    without: tuple[str, ...] = Field(default=())
    """Names of rules of that policy that do not hold here."""

    @model_validator(mode="after")
    def _whole(self) -> PolicyFile:
        if self.extends is None and "rules" not in self.model_fields_set:
            raise ValueError("'rules' is missing; a policy has rules of its own, or 'extends' another")
        if self.extends is None and self.without:
            raise ValueError("'without' needs 'extends': it names rules of the policy that is extended")
        return self


def load_policy(path: str | Path, _through: tuple[str, ...] = ()) -> Policy:
    """The policy that a file means, or a shipped one by name. Raises PolicyError naming file, line and field."""
    text = read_policy_text(path)
    given = _parse(text)
    own = {rule.label: rule for rule in given.rules}
    fields: dict[str, Any] = {name: getattr(given, name) for name in Policy.model_fields}
    origins: dict[str, Origin] = {rule.label: (text, ("rules", number)) for number, rule in enumerate(given.rules)}
    if given.extends is not None:
        base = _base(text, given.extends, _through)
        known = {rule.label for rule in base.rules}
        for number, label in enumerate(given.without):
            if label not in known:
                raise PolicyError(
                    f"{text.where(('without', number))}, field 'without.{number}': {given.extends!r} has no rule "
                    f"{label!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
        kept = [own.get(rule.label, rule) for rule in base.rules if rule.label not in given.without]
        added = [rule for rule in given.rules if rule.label not in known or rule.label in given.without]
        set_here = given.model_fields_set
        fields = {name: getattr(given if name in set_here else base, name) for name in Policy.model_fields}
        fields["rules"] = (*kept, *added)
        origins = {**base.origins, **origins}
    policy = Policy(**fields)
    policy.keep_origins(text, origins)
    return policy


def _parse(text: PolicyText) -> PolicyFile:
    try:
        return PolicyFile.model_validate(text.data)
    except ValidationError as e:
        errors = e.errors()  # a misspelt field is also one that is missing: the spelling is the cause
        first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
        field = ".".join(str(part) for part in first["loc"]) or "rules"
        reason = first["msg"].removeprefix("Value error, ")
        reason = "there is no such field" if first["type"] == "extra_forbidden" else reason
        raise PolicyError(f"{text.where(first['loc'])}, field {field!r}: {reason}") from e


def _base(text: PolicyText, extends: str, through: tuple[str, ...]) -> Policy:
    """The policy that a file extends, looked for beside it."""
    place = f"{text.where(('extends',))}, field 'extends'"
    try:
        beside = Path(text.source).parent / extends
        path = str(beside) if beside.exists() or extends not in shipped_policies() else extends
        here = (*through, str(Path(text.source).resolve()))
        again = str(Path(path).resolve()) in here
    except (OSError, ValueError, RuntimeError) as e:  # a name that no file can have, or links in a circle
        raise PolicyError(f"{place}: it cannot be looked for: {e}") from e
    if again or len(here) > MAX_DEPTH:
        raise PolicyError(f"{place}: the files extend each other in a circle, or more than {MAX_DEPTH} deep")
    try:
        return load_policy(path, here)
    except PolicyError as e:
        raise PolicyError(f"{place}: {e}") from e
