"""Trainers compared: steps in interleaved rounds, tokens/s, and what each has learnt after the same tokens."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import peers
from benchmarks.overhead import interleaved, ratios, spread
from benchmarks.peers import ARMS, HOOK_NAME, PACKAGES, Arm, Family, Setting
from feature_bank.sae import SAE
from training.batches import TensorReader

OURS = "sailguard"
STEPS_A_ROUND = 4
QUALITY_DEAD_AFTER = 100_000  # tokens; the runs are short
WARMUP_SHARE, DECAY_SHARE = 0.05, 0.3
SAMPLE_ROWS = 16_384

Measured = Mapping[str, Sequence[float]]


# ---- batches and arms --------------------------------------------------------------------------------------


class Batches:
    """The batches of a comparison in groups of `per_round`; every arm asks for the same groups, one after the other."""

    def __init__(self, rows: Float[Tensor, "tokens d_in"], setting: Setting, per_round: int) -> None:
        self._reader = TensorReader({HOOK_NAME: rows}, batch_tokens=setting.batch_tokens, seed=setting.seed)
        self._per_round = per_round
        self._device = setting.device
        self._latest: tuple[int, list[Tensor]] = (-1, [])

    def round(self, number: int) -> list[Float[Tensor, "batch d_in"]]:
        """The batches of round `number`; the latest round is kept for the other arms."""
        if self._latest[0] != number:
            found = islice(self._reader.batches(number * self._per_round), self._per_round)
            self._latest = number, [batch[HOOK_NAME].to(self._device) for batch in found]
        return self._latest[1]

    def sample(self) -> Float[Tensor, "n d_in"]:
        """Rows from all over the data."""
        return self._reader.sample(SAMPLE_ROWS)[HOOK_NAME].to(self._device)


def stepping(arm: Arm, batches: Batches) -> Callable[[], float]:
    """A call makes the arm's steps of the next round and gives their seconds. Reading is outside the clock."""
    number = count()

    def run() -> float:
        group = batches.round(next(number))
        gc.collect()
        wait()
        started = time.perf_counter()
        for batch in group:
            arm.step(batch)
        wait()
        return time.perf_counter() - started

    return run


def make_arms(names: Iterable[str], setting: Setting, batches: Batches) -> dict[str, Arm]:
    """The arms of a comparison, from the same setting and sample."""
    sample = batches.sample()
    return {name: peers.create(name, setting, sample) for name in names}


def wait() -> None:
    """Until an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- speed -------------------------------------------------------------------------------------------------


def measure_speed(
    rows: Float[Tensor, "tokens d_in"], setting: Setting, names: Sequence[str], repeats: int
) -> dict[str, list[float]]:
    """Tokens a second of every arm in every round; the first round of each is thrown away."""
    batches = Batches(rows, setting, STEPS_A_ROUND)
    arms = make_arms(names, setting, batches)
    seconds = interleaved({name: stepping(arm, batches) for name, arm in arms.items()}, repeats)
    tokens = STEPS_A_ROUND * setting.batch_tokens
    return {name: [tokens / s for s in values] for name, values in seconds.items()}


def speed_ratios(speeds: Measured) -> dict[str, dict[str, Any]]:
    """`topk_vs_sae_lens` and the like: the spread of our tokens/s over theirs within a round.

    Of several arms of one library and kind the faster counts.
    """
    found: dict[str, dict[str, Any]] = {}
    for family in ("topk", "batchtopk"):
        ours = f"{OURS}_{family}"
        if ours not in speeds:
            continue
        inverse = {name: [1 / s for s in values] for name, values in speeds.items()}
        slower = ratios(inverse, ours)
        for library in PACKAGES:
            rivals = [name for name in slower if ARMS[name][0] == library and ARMS[name][2] == family]
            if rivals:
                best = min((spread(slower[name]) | {"arm": name} for name in rivals), key=lambda r: r["median"])
                found[f"{family}_vs_{library}"] = best
    return found


# ---- quality -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well an SAE reconstructs held-out rows."""

    fvu: float
    """With exactly k active features a token: TopK by token, BatchTopK over batches, as it is trained."""
    l0: float
    threshold_fvu: float | None
    """BatchTopK with its own learnt threshold instead, and..."""
    threshold_l0: float | None
    """...the active features that gives."""
    unused: float
    """Share of features that no held-out row activates."""


@torch.no_grad()
def evaluate(sae: SAE, rows: Float[Tensor, "tokens d_in"], *, family: Family, k: int, batch_tokens: int) -> Quality:
    """The same dense arithmetic for whoever trained the SAE. FVU is over the variance of all rows."""
    weight, bias = sae.folded_encoder()
    mean = rows.float().mean(0)
    total = error = threshold_error = 0.0
    active = threshold_active = seen = 0
    used = torch.zeros(sae.d_sae, dtype=torch.bool)
    for part in torch.split(rows, batch_tokens):
        x = part.float()
        pre = torch.addmm(bias, x, weight).relu()
        if family == "topk":
            values, at = pre.topk(k, dim=1)
            acts = torch.zeros_like(pre).scatter_(1, at, values)
        else:
            wanted = min(k * len(x), pre.numel())
            values, at = pre.flatten().topk(wanted)
            acts = torch.zeros_like(pre).flatten().scatter_(0, at, values).view_as(pre)
            above = pre * (pre > sae.threshold)
            threshold_error += float((sae.decode(above) - x).pow(2).sum())
            threshold_active += int((above > 0).sum())
        error += float((sae.decode(acts) - x).pow(2).sum())
        total += float((x - mean).pow(2).sum())
        active += int((acts > 0).sum())
        used |= (acts > 0).any(0)
        seen += len(x)
    batch = family == "batchtopk"
    return Quality(
        fvu=error / total,
        l0=active / seen,
        threshold_fvu=threshold_error / total if batch else None,
        threshold_l0=threshold_active / seen if batch else None,
        unused=1 - float(used.float().mean()),
    )


def schedule(setting: Setting, tokens: int, lr: float) -> Setting:
    """`setting` for a run of `tokens` tokens, in whole rounds."""
    steps = max(2, tokens // setting.batch_tokens // STEPS_A_ROUND) * STEPS_A_ROUND
    return replace(
        setting,
        steps=steps,
        lr=lr,
        warmup_steps=max(1, round(steps * WARMUP_SHARE)),
        decay_steps=max(1, round(steps * DECAY_SHARE)),
        dead_after_tokens=QUALITY_DEAD_AFTER,
    )


def measure_quality(
    rows: Float[Tensor, "tokens d_in"],
    held_out: Float[Tensor, "tokens d_in"],
    setting: Setting,
    names: Sequence[str],
    lrs: Sequence[float],
    tokens: int,
) -> dict[str, dict[str, Any]]:
    """By arm: what it reached after `tokens` tokens at each learning rate, and its median speed on the way."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for lr in lrs:
        own = schedule(setting, tokens, lr)
        batches = Batches(rows, own, STEPS_A_ROUND)
        arms = make_arms(names, own, batches)
        runs = {name: stepping(arm, batches) for name, arm in arms.items()}
        seconds = interleaved(runs, own.steps // STEPS_A_ROUND - 1)  # its first round, not timed, trains as well
        for name, arm in arms.items():
            quality = evaluate(arm.export(), held_out, family=ARMS[name][2], k=own.k, batch_tokens=own.batch_tokens)
            speeds = [STEPS_A_ROUND * own.batch_tokens / s for s in seconds[name]]
            found[name][f"{lr:g}"] = asdict(quality) | {"tokens_per_s": spread(speeds)}
            print(f"quality {name} lr {lr:g}: {found[name][f'{lr:g}']}", flush=True)
    return found


def quality_ratios(qualities: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By kind: our FVU over the best peer's, each arm at the learning rate that is best for it."""
    best = {name: min(by_lr.values(), key=lambda q: q["fvu"])["fvu"] for name, by_lr in qualities.items()}
    found: dict[str, dict[str, Any]] = {}
    for family in ("topk", "batchtopk"):
        rivals = {n: fvu for n, fvu in best.items() if ARMS[n][2] == family and ARMS[n][0] != OURS}
        ours = best.get(f"{OURS}_{family}")
        if ours is not None and rivals:
            name = min(rivals, key=lambda n: rivals[n])
            found[family] = {"value": ours / rivals[name], "best": name, "fvu": ours, "best_fvu": rivals[name]}
    return found
