"""Ranking SAEs (layer x sparsity) by what contrast pairs say of them, and the choice that follows, with its reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from feature_bank.errors import BankError, DataError
from feature_bank.sae import SAE
from feature_bank.taxonomy import Domain
from guard.capture import truncated_forward
from guard.hook_points import execution_order, resolve
from training.cache import Harvest
from training.contrast import ContrastTexts, inlier_rows, measure_firing
from training.quality import placed
from training.selection import BEST, PERMUTATIONS, DomainContrast, Measured, contrast_figures
from training.sweep import Reporter


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An SAE to be ranked; its weights are loaded when their turn comes."""

    name: str
    hook_name: str
    d_in: int
    d_sae: int
    load: Callable[[], SAE]
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of it, JSON-ready: its architecture, figures of its training, hash."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A candidate with its figures."""

    candidate: Candidate
    l0: float
    """Active features a token, mean over the pairs' tokens."""
    alive: int
    """Features that fire on some text of the pairs."""
    domains: Mapping[Domain, DomainContrast]

    @property
    def name(self) -> str:
        """The candidate's."""
        return self.candidate.name

    @property
    def separation(self) -> float:
        """What is ranked by: the margin of `separation`, mean over domains."""
        return self.mean("separation")

    @property
    def error(self) -> float | None:
        """Standard error of `separation`: a jackknife over groups of concepts. None if a domain has one concept."""
        return _jackknife([np.array(domain.left_out) for domain in self.domains.values()])

    def mean(self, figure: str, *, margin: bool = True) -> float:
        """A figure's margin over its null (or its value), mean over domains."""
        found: list[Measured] = [getattr(domain, figure) for domain in self.domains.values()]
        return float(np.mean([m.margin if margin else m.value for m in found]))

    def mean_over_concepts(self, figure: str) -> float:
        """The margin of each concept's own figure, mean over a domain's concepts and then over domains."""
        return float(
            np.mean([np.mean([getattr(c, figure).margin for c in d.concepts.values()]) for d in self.domains.values()])
        )


class Lead(NamedTuple):
    """By how much one SAE is ahead of another, and the standard error of that; None if it cannot be told."""

    value: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which SAE to build on, of all and at each hook point, and why."""

    overall: str
    by_hook_point: Mapping[str, str]
    why: tuple[str, ...]


def check_candidates(candidates: Sequence[Candidate], model: Any) -> tuple[str, ...]:
    """The hook points that the candidates read, in the order of the model.

    Raises DataError if there is no candidate or two share a name; GuardError for a hook point that the model does not
    have; BankError for an SAE of another width.
    """
    if not candidates:
        raise DataError("there is no SAE to select from; name the folder of at least one")
    names = [c.name for c in candidates]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two SAEs are named {repeated[0]!r}; give each a name of its own")
    hooks = tuple(sorted({c.hook_name for c in candidates}, key=execution_order))
    for hook in hooks:
        resolve(model, hook)
    device = next(model.parameters()).device
    widths = truncated_forward(model, hooks, torch.zeros(1, 1, dtype=torch.long, device=device))
    for candidate in candidates:
        width = widths[candidate.hook_name].shape[-1]
        if candidate.d_in != width:
            raise BankError(
                f"{candidate.d_in} is not the width {width} of {candidate.hook_name}; is {candidate.name} an SAE of "
                "another model?",
                field="d_in",
            )
    return hooks


def rank_candidates(
    candidates: Sequence[Candidate],
    cache: Harvest,
    texts: ContrastTexts,
    *,
    report: Reporter,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    best: int = BEST,
    device: torch.device | None = None,
) -> list[Ranked]:
    """The candidates with their figures, best first; equals are ordered by sparsity, the sparser first.

    cache: the activations of `texts.documents` at the candidates' hook points. One hook point's activations and one SAE
    are in memory at a time. Attention sinks are left out.

    Raises DataError or BankError as the parts do.
    """
    found: list[Ranked] = []
    used = [row for pair in texts.pairs for row in (pair.positive, pair.negative)]
    for hook in dict.fromkeys(c.hook_name for c in candidates):
        kept = inlier_rows(cache, hook)
        activations, documents = cache.activations(hook)[torch.from_numpy(kept)], cache.documents[kept]
        for candidate in (c for c in candidates if c.hook_name == hook):
            sae = placed(candidate.load(), device or torch.device("cpu"))
            fires = measure_firing(sae, activations, documents, len(texts.documents))
            del sae
            figures = contrast_figures(fires.fired, texts, permutations=permutations, seed=seed, best=best)
            alive = int(fires.fired[used].any(0).sum())
            found.append(Ranked(candidate=candidate, l0=fires.l0, alive=alive, domains=figures))
            report("select", len(found), len(candidates), f"{candidate.name}: separation {found[-1].separation:.4f}")
    return sorted(found, key=lambda r: (-r.separation, r.l0, r.name))


def by_hook_point(ranked: Sequence[Ranked]) -> dict[str, list[Ranked]]:
    """The ranking of each hook point, in the order of the model."""
    hooks = sorted({r.candidate.hook_name for r in ranked}, key=execution_order)
    return {hook: [r for r in ranked if r.candidate.hook_name == hook] for hook in hooks}


def lead(first: Ranked, second: Ranked) -> Lead:
    """The difference of two separations on the same pairs; its error is a jackknife over groups of concepts."""
    differences = [np.subtract(own.left_out, second.domains[name].left_out) for name, own in first.domains.items()]
    return Lead(first.separation - second.separation, _jackknife(differences))


def _jackknife(left_out: Sequence[npt.NDArray[np.float64]]) -> float | None:
    """Standard error of a mean over domains, of each of which the values without every group are given."""
    variances = []
    for values in left_out:
        if len(values) < 2:
            return None
        variances.append((len(values) - 1) / len(values) * float(((values - values.mean()) ** 2).sum()))
    return float(np.sqrt(sum(variances)) / len(variances))


def choose(ranked: Sequence[Ranked]) -> Choice:
    """The first of all and the first at each hook point of a ranking, in words."""
    if not ranked:
        raise DataError("there is no SAE to choose from")
    first = ranked[0]
    percent = 100 * first.separation
    domains = ", ".join(f"{name} {100 * d.separation.margin:.1f}" for name, d in first.domains.items())
    why = [
        f"{first.name} separates best: its best features fire on the text with the concept and not on its twin in "
        f"{percent:.1f} of 100 pairs more often than the other way round, beyond what pairs turned round at random "
        f"give ({domains})."
    ]
    if len(ranked) > 1:
        why.append(_about_second(first, ranked[1]))
    if weak := [name for name, d in first.domains.items() if d.separation.value <= d.separation.null_high]:
        why.append(f"It is within its null on {', '.join(weak)}: there it tells nothing apart.")
    by_hook: dict[str, str] = {}
    for hook, here in by_hook_point(ranked).items():
        by_hook[hook] = here[0].name
        if len(here) > 1:
            why.append(
                f"At {hook}: {here[0].name} ({here[0].separation:.4f}), next {here[1].name} ({here[1].separation:.4f})."
            )
    return Choice(overall=first.name, by_hook_point=by_hook, why=tuple(why))


def _about_second(first: Ranked, second: Ranked) -> str:
    ahead = lead(first, second)
    if ahead.error is None:
        return f"The next is {second.name}, behind by {ahead.value:.4f}."
    text = f"The next is {second.name}, behind by {ahead.value:.4f} with a standard error of {ahead.error:.4f}"
    if ahead.value > 2 * ahead.error:
        return f"{text}."
    return f"{text}: these pairs do not tell the two apart."
