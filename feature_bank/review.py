"""What people say of a bank's features: an append-only log beside its files, and the labels that follow from it.

The log is outside the bank's hashes, and the guard never reads it: a rejection takes effect with the next version that
is refitted without the feature. Each review names the version it was given at and the SAE that the feature is a row of,
so that it can be carried into later versions and counts there only where the SAE is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from feature_bank.bank import REVIEWS, Bank, bank_folder
from feature_bank.errors import BankError
from feature_bank.journal import Content, Journal, hold, read
from feature_bank.taxonomy import load_taxonomy
from feature_bank.verdicts import Draft, Overrides, Review, Verdict, parse_record, read_moment, write_moment

__all__ = [
    "Draft",
    "EffectiveLabel",
    "Overrides",
    "Pending",
    "Review",
    "ReviewLog",
    "Status",
    "append_reviews",
    "carry_reviews",
    "check_drafts",
    "effective",
    "known_concepts",
    "load_labels",
    "load_reviews",
    "merge_reviews",
    "parse_reviews",
    "pending",
    "rejected_ids",
    "review_file",
    "write_reviews",
]

Status = Literal["unreviewed", "accepted", "rejected"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewLog:
    """A bank's reviews in the order of their times."""

    reviews: tuple[Review, ...] = ()
    torn: tuple[int, ...] = ()
    """Lines of the file that a writer did not get to the end of. They are left there and count for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveLabel:
    """What holds of a feature: field by field the last review that sets it, else the machine's label."""

    domains: tuple[str, ...]
    concepts: tuple[str, ...]
    explanation: str
    status: Status = "unreviewed"
    """By the last verdict that is no note; a relabelled feature is an accepted one."""
    reviewer: str | None = None
    time: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Reviews that this version does not carry out yet."""

    rejected: tuple[str, ...]
    """Rejected features that a head still holds."""
    relabelled: tuple[str, ...]
    """Features whose record differs from their effective label."""

    def __len__(self) -> int:
        return len({*self.rejected, *self.relabelled})


def load_reviews(path: str | Path) -> ReviewLog:
    """The reviews of the bank at `path`. Raises BankError naming line and field for a malformed one."""
    return parse_reviews(read(review_file(path)))


def append_reviews(path: str | Path, drafts: Sequence[Draft], *, bank: Bank | None = None) -> list[Review]:
    """Add reviews to the log of the bank at `path`: all of them, or none.

    Times are given here, each later than that of every review in the log, so that the log's order is that of the times
    even if a clock was set back.

    Raises BankError for an unknown feature or concept, or a log that is malformed.
    """
    bank = Bank.load(path) if bank is None else bank
    check_drafts(bank, drafts)
    with hold(review_file(path)) as journal:
        log = parse_reviews(journal.read())
        moment = datetime.now(UTC)
        if log.reviews:
            last = read_moment(log.reviews[-1].time)
            moment = max(moment, last + timedelta(microseconds=1))
        reviews = [
            Review(
                **draft.model_dump(),
                time=write_moment(moment + timedelta(microseconds=index)),
                bank=bank.version,
                content_hash=bank.content_hash,
                sae_sha256=_sae_hash(bank, draft.feature),
            )
            for index, draft in enumerate(drafts)
        ]
        write_reviews(journal, reviews)
    return reviews


def carry_reviews(source: str | Path, target: str | Path) -> int:
    """Add to the log at `target` what only the log at `source` holds, as it is; returns how many that were."""
    reviews = load_reviews(source).reviews
    with hold(review_file(target)) as journal:
        return merge_reviews(journal, reviews)


def merge_reviews(journal: Journal, reviews: Iterable[Review]) -> int:
    """Add to a log those of `reviews` that it lacks; returns how many that were."""
    known = {review.model_dump_json() for review in parse_reviews(journal.read()).reviews}
    given = {review.model_dump_json(): review for review in sorted(reviews, key=lambda review: review.time)}
    missing = [review for key, review in given.items() if key not in known]
    write_reviews(journal, missing)
    return len(missing)


def write_reviews(journal: Journal, reviews: Iterable[Review]) -> None:
    """Append reviews to a log whose lock is held."""
    journal.append(review.model_dump(exclude_none=True) for review in reviews)


def check_drafts(bank: Bank, drafts: Iterable[Draft]) -> None:
    """Raise BankError for a review of an unknown feature, or a relabel to an unknown concept."""
    concepts: frozenset[str] | None = None
    for draft in drafts:
        if draft.feature not in bank.by_id:
            raise BankError(
                f"the bank {bank.version} has no feature {draft.feature!r}; `sailguard bank list` names them",
                field="feature",
            )
        for concept in (draft.overrides and draft.overrides.concepts) or ():
            concepts = known_concepts(bank) if concepts is None else concepts
            if concept not in concepts:
                raise BankError(
                    f"neither the taxonomy nor the bank knows the concept {concept!r}; "
                    "`sailguard taxonomy list` names them",
                    field="concepts",
                )


def known_concepts(bank: Bank) -> frozenset[str]:
    """The names of concepts that may be asked for: the taxonomy's, bare and as `domain/concept`, and the bank's."""
    names = {concept for feature in bank.features for concept in feature.concepts}
    for domain, record in load_taxonomy().items():
        for concept in record.concepts:
            names |= {concept.id, f"{domain}/{concept.id}"}
    return frozenset(names)


def effective(bank: Bank, reviews: Iterable[Review]) -> dict[str, EffectiveLabel]:
    """The effective label of each of the bank's features.

    A review counts if it was given to a row of the same SAE, at whatever version. Raises BankError for one that was
    given at this very version to a feature that it does not have.
    """
    labels = {
        feature.id: EffectiveLabel(
            domains=tuple(feature.domains), concepts=tuple(feature.concepts), explanation=feature.explanation
        )
        for feature in bank.features
    }
    for review in sorted(reviews, key=lambda review: review.time):
        if review.feature not in labels:
            if review.content_hash == bank.content_hash:
                raise BankError(
                    f"the bank {bank.version} has no feature {review.feature!r}; the file was altered",
                    file=REVIEWS,
                    field="feature",
                )
        elif review.sae_sha256 == _sae_hash(bank, review.feature):
            labels[review.feature] = _apply(labels[review.feature], review)
    return labels


def load_labels(path: str | Path, bank: Bank) -> tuple[ReviewLog, dict[str, EffectiveLabel]]:
    """The reviews of the bank at `path`, and the effective labels that follow from them."""
    log = load_reviews(path)
    return log, effective(bank, log.reviews)


def rejected_ids(path: str | Path) -> frozenset[str]:
    """Features that the bank at `path` must not use: those whose last verdict is a rejection.

    Among them are features that this version leaves out already, if they are rows of one of its SAEs.
    """
    bank = Bank.load(path)
    saes = {hook.sae_sha256 for hook in bank.manifest.hook_points}
    verdicts: dict[str, Verdict] = {}
    log, labels = load_labels(path, bank)
    for review in log.reviews:
        if review.feature not in labels and review.sae_sha256 in saes and review.verdict != "note":
            verdicts[review.feature] = review.verdict
    left_out = {feature for feature, verdict in verdicts.items() if verdict == "reject"}
    return frozenset(left_out | {feature for feature, label in labels.items() if label.status == "rejected"})


def pending(bank: Bank, labels: Mapping[str, EffectiveLabel]) -> Pending:
    """What a refitted version would change."""
    used = {feature for head in bank.heads.values() for feature in head.features}
    return Pending(
        rejected=tuple(f.id for f in bank.features if f.id in used and labels[f.id].status == "rejected"),
        relabelled=tuple(
            f.id
            for f in bank.features
            if (labels[f.id].domains, labels[f.id].concepts, labels[f.id].explanation)
            != (tuple(f.domains), tuple(f.concepts), f.explanation)
        ),
    )


def review_file(path: str | Path) -> Path:
    """Where the reviews of the bank at `path` are kept."""
    return bank_folder(path) / REVIEWS


def parse_reviews(content: Content) -> ReviewLog:
    """The reviews that a journal holds. Raises BankError naming line and field for a malformed one."""
    reviews = [parse_record(Review, entry.data, f"{REVIEWS}:{entry.line}") for entry in content.entries]
    return ReviewLog(reviews=tuple(sorted(reviews, key=lambda review: review.time)), torn=content.torn)


def _apply(label: EffectiveLabel, review: Review) -> EffectiveLabel:
    if review.verdict == "note":
        return label
    changes: dict[str, Any] = {}
    if review.overrides is not None:
        for name, value in review.overrides.model_dump(exclude_none=True).items():
            changes[name] = tuple(value) if isinstance(value, list) else value
    status: Status = "rejected" if review.verdict == "reject" else "accepted"
    return replace(label, **changes, status=status, reviewer=review.reviewer, time=review.time)


def _sae_hash(bank: Bank, feature: str) -> str:
    name = bank.by_id[feature].hook_name
    return next(hook.sae_sha256 for hook in bank.manifest.hook_points if hook.hook_name == name)
