"""What executable explanations are worth and cost, and what a language model would cost at either level.

    python -m benchmarks.explanation --data DIR --work FOLDER [--bank FOLDER] [--features N] [--docs]

FOLDER is the work folder of the training run that made the bank from `fit.jsonl.gz` and `general.jsonl.gz` of DIR. The
bank's features, or a sample of them, are explained and scored anew, each on the same segments at both levels; the cost
of a language model is counted on the very prompts and the shortest right answers to them, without sending any. The
result holds no text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.results import RESULTS, Figure, write_result
from feature_bank.schema import SimulationScore
from training.explain.executable import ExplainedFeature
from training.explain.segmented import SegmentedText
from training.selected import FeatureKey
from training.simulation.samples import Sample

CONTROLS = 24  # random directions a hook point
LEVELS = ("segment", "token")
Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Tokens of prompts and answers, counted with the model's tokenizer and chat template."""

    requests: int = 0
    prompt: int = 0
    answer: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.answer

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            requests=self.requests + other.requests,
            prompt=self.prompt + other.prompt,
            answer=self.answer + other.answer,
        )


def spent(exchanges: Iterable[tuple[Messages, str]], tokenizer: Any) -> Spent:
    """What prompts and the answers to them take."""
    total = Spent()
    for messages, answer in exchanges:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt, reply = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (rendered, answer))
        total += Spent(requests=1, prompt=prompt, answer=reply)
    return total


def exchanges(explanation: str, sample: Sample, text: SegmentedText, level: str) -> Iterable[tuple[Messages, str]]:
    """The requests about one feature and what a simulator that knows the truth would answer."""
    from training.simulation.prompts import batches, segment_answer, segment_prompt, token_answer, token_prompt

    tokens = [text.tokens(int(number)) for number in sample.numbers]
    grades = [sample.tokens.grades[sample.owner == place].tolist() for place in range(len(tokens))]
    for rows in batches([len(row) for row in tokens], "token" if level == "token" else "segment"):
        if level == "token":
            yield token_prompt(explanation, [tokens[i] for i in rows]), token_answer([grades[i] for i in rows])
        else:
            yield (
                segment_prompt(explanation, ["".join(tokens[i]) for i in rows]),
                segment_answer([int(sample.segments.fires[i]) for i in rows]),
            )


def summarise(
    scores: Sequence[Sequence[SimulationScore]], controls: Sequence[Sequence[SimulationScore]]
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Figures of the scores, segment level first, and their spread."""
    from scipy.stats import spearmanr

    both = [row for row in scores if len(row) == len(LEVELS)]
    if len(both) < 3:
        raise SystemExit("too few features fire in the test split to compare the levels")
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {}
    corr = {level: np.array([row[i].corr for row in both]) for i, level in enumerate(LEVELS)}
    for i, level in enumerate(LEVELS):
        prefix = "" if level == "segment" else "token_"
        above = [row[i].corr_low > row[i].corr_null for row in both]
        values = {
            "corr_score_mean": corr[level].mean(),
            "corr_score_null_mean": np.mean([row[i].corr_null_mean for row in both]),
            "corr_score_null_p975_mean": np.mean([row[i].corr_null for row in both]),
            "above_null": np.mean(above),
        }
        random = [row[i].corr for row in controls if len(row) == len(LEVELS)]
        if random:
            values["corr_score_random_directions_mean"] = np.mean(random)
        for name, value in values.items():
            unit = "share" if name == "above_null" else "correlation"
            figures[prefix + name] = Figure(value=round(float(value), 4), unit=unit, n=len(both))
        detail[level] = {
            "corr_quantiles": {
                f"{q:g}": round(float(np.quantile(corr[level], q)), 4) for q in (0.05, 0.25, 0.5, 0.75, 0.95)
            },
            "auroc_mean": _mean([row[i].auroc for row in both]),
            "balanced_accuracy_mean": _mean([row[i].balanced_accuracy for row in both]),
            "pr_auc_mean": _mean([row[i].pr_auc for row in both]),
            "units_mean": round(float(np.mean([row[i].n for row in both])), 1),
            "missing": sum(row[i].missing for row in both),
        }
    rank = float(spearmanr(corr["segment"], corr["token"]).statistic)
    figures["segment_rank_correlation"] = Figure(value=round(rank, 4), unit="spearman", n=len(both))
    draws = np.random.default_rng(0).integers(0, len(both), (500, len(both)))
    varied = [d for d in draws if all(np.ptp(corr[level][d]) > 0 for level in LEVELS)]
    resampled = [float(spearmanr(corr["segment"][d], corr["token"][d]).statistic) for d in varied]
    detail["segment_rank_correlation_95"] = [round(float(q), 4) for q in np.quantile(resampled, (0.025, 0.975))]
    return figures, detail


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of a bank on its training corpus, and random directions beside them."""

    keys: list[FeatureKey]
    acts: npt.NDArray[np.float16]
    control_keys: list[FeatureKey]
    control_acts: npt.NDArray[np.float16]


def read_features(bank: Any, run: Any, features: int, controls: int) -> Features:
    """`features` of the bank evenly over its order, and `controls` directions a hook point that fire as often."""
    from training.activations import encode_tokens
    from training.simulation.nulls import random_directions

    order = np.unique(np.linspace(0, len(bank.features) - 1, min(features, len(bank.features))).round().astype(int))
    chosen = [bank.features[i] for i in order]
    keys: list[FeatureKey] = []
    control_keys: list[FeatureKey] = []
    acts, control_acts = [], []
    for hook in run.hooks:
        name = hook.sae.hook_name
        here = [record for record in chosen if record.hook_name == name]
        if not here:
            continue
        activations = run.cache.activations(name)
        scale = np.ones(hook.sae.d_sae, dtype=np.float32)
        scale[[record.index for record in here]] = [record.scale for record in here]
        acts.append(encode_tokens(hook.sae, activations, [record.index for record in here], scale))
        keys += [(name, record.index) for record in here]
        density = np.resize([max(record.density, 1e-4) for record in here], controls)
        control_acts.append(random_directions(activations, density, seed=0))
        control_keys += [(name, i) for i in range(controls)]
    return Features(
        keys=keys,
        acts=np.concatenate(acts, axis=1),
        control_keys=control_keys,
        control_acts=np.concatenate(control_acts, axis=1),
    )


def measure(
    features: Features, text: SegmentedText, tokenizer: Any, taxonomy: Any, *, count_costs: bool = True
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Explain, score and count."""
    from training.explain.executable import explain_features
    from training.simulation.fidelity import score_features
    from training.simulation.samples import choose_samples

    n = len(features.keys)

    def explain(acts: Any, keys: Any) -> list[ExplainedFeature]:
        return explain_features(acts, keys, text, taxonomy, tokenizer, seed=0)

    def simulate(acts: Any, keys: Any, found: Sequence[ExplainedFeature]) -> list[list[SimulationScore]]:
        predicates = [f.explanation.predicate for f in found if f.explanation.predicate is not None]
        return score_features(acts, keys, predicates, text, taxonomy, seed=0)

    found, explained_in = timed(lambda: explain(features.acts, features.keys))
    scores, simulated_in = timed(lambda: simulate(features.acts, features.keys, found))
    controls = simulate(
        features.control_acts, features.control_keys, explain(features.control_acts, features.control_keys)
    )
    figures, detail = summarise(scores, controls)
    for name, seconds in (("explain_", explained_in), ("simulate_", simulated_in), ("", explained_in + simulated_in)):
        figures[f"{name}seconds_per_feature"] = Figure(value=round(seconds / n, 4), unit="s", n=n)
    detail["kinds"] = {kind: sum(f.kind == kind for f in found) for kind in ("lexical", "conceptual")}
    detail["terms"] = {
        kind: sum(t.kind == kind for f in found if f.explanation.predicate for t in f.explanation.predicate.terms)
        for kind in ("token", "ngram", "concept")
    }
    if count_costs:
        costs = {level: Spent() for level in LEVELS}
        for explained, sample in zip(found, choose_samples(features.acts, features.keys, text, seed=0), strict=True):
            for level in LEVELS:
                costs[level] += spent(exchanges(explained.explanation.text, sample, text, level), tokenizer)
        saving = 1 - costs["segment"].total / costs["token"].total
        figures["segment_token_saving"] = Figure(value=round(saving, 4), unit="share", n=n)
        detail["tokens_per_feature"] = {
            level: {
                name: round(value / n, 1)
                for name, value in (("requests", cost.requests), ("prompt", cost.prompt), ("answer", cost.answer))
            }
            for level, cost in costs.items()
        }
    return figures, detail


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and how many seconds it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explanation", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with fit.jsonl.gz and general.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="work folder of the bank's training run")
    parser.add_argument("--bank", type=Path, help="bank folder; the shipped one if left out")
    parser.add_argument("--preset", default="smollm2-135m", help="the preset that the bank was made with")
    parser.add_argument("--features", type=int, help="so many features, evenly over the bank; all if left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/performance.md")
    options = parser.parse_args(arguments)

    from feature_bank.bank import Bank, shipped_bank_path
    from feature_bank.identity import identify
    from feature_bank.taxonomy import load_taxonomy
    from guard import load_model
    from training.explain.segmented import segment_text
    from training.pipeline import load_preset, prepare

    bank = Bank.load(options.bank or shipped_bank_path())
    model, tokenizer, model_id = load_model(device="cpu")
    run = prepare(
        model=model,
        tokenizer=tokenizer,
        identity=identify(model, tokenizer, model_id),
        preset=load_preset(options.preset),
        data=[options.data / name for name in ("fit.jsonl.gz", "general.jsonl.gz")],
        work=options.work,
        report=lambda stage, done, total, detail: print(f"{stage}: {detail}", flush=True) if done == total else None,
    )
    text, segmented_in = timed(
        lambda: segment_text(run.cache.token_ids, run.cache.documents, run.documents, tokenizer.decode)
    )
    features = read_features(bank, run, options.features or len(bank.features), CONTROLS)
    figures, detail = measure(features, text, tokenizer, load_taxonomy())
    detail |= {
        "bank": {"version": bank.version, "content_hash": bank.content_hash, "features": len(bank.features)},
        "corpora": [record.model_dump() for record in run.records],
        "tokens": run.cache.tokens,
        "segments": {split: len(text.numbers(split)) for split in ("discovery", "calibration", "test")},
        "cut_seconds": round(segmented_in, 2),
        "random_directions": len(features.control_keys),
    }
    for key, figure in figures.items():
        print(f"{key}: {figure.value} {figure.unit}")
    print(write_result("explanation", figures, detail, packages=("scikit-learn", "scipy"), folder=options.out))
    if options.docs:
        from benchmarks.tables import update

        update("explanation", options.out)


if __name__ == "__main__":
    main()
