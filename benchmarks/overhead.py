"""What the guard costs in time: decoding and prefill with it over the same without it, 1.00 = free.

    python -m benchmarks.overhead [--bank FOLDER] [--tokens 64] [--pairs 15] [--docs]

One model, one process: each round runs the unguarded model, the guarded one and one that encodes a whole SAE
at the same hook points; every second round runs backwards, so that a warming processor's drift cancels.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, Figure, write_result
from feature_bank.taxonomy import DOMAINS

D_SAE = 4608  # eight times the embedded model's width
PREFILL_TOKENS = 512
PROMPTS = (
    "Explain how a rainbow forms.",
    "Suggest a name for a small bakery by the sea.",
    "How do I keep basil alive on a windowsill in winter?",
    "Summarise the rules of chess for a child.",
    "Write a short poem about a train in the snow.",
    "What should I pack for a weekend of hiking?",
    "Give me three ideas for a birthday cake.",
    "Why do cats purr?",
)
PASSAGE = (
    "The lighthouse keeper wrote down the weather every morning: wind, cloud, the height of the waves, and "
    "whether the ferry had come. In the afternoon she mended nets, fed the hens and read. "
)
TIMED = ("_before_forward", "_at_hook", "_after_forward")
"""The engine's methods that the model calls during a forward pass."""


# ---- measuring ---------------------------------------------------------------------------------------------


def interleaved(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every arm's own measurement, round by round, after one call of each that is thrown away.

    Odd rounds run backwards (A B C, C B A, ...): a steady drift then costs every arm the same.
    """
    for arm in arms.values():
        arm()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            found[name].append(arms[name]())
    return found


def ratios(measured: Mapping[str, Sequence[float]], base: str) -> dict[str, list[float]]:
    """Round by round, every other arm over `base`."""
    return {
        name: [a / b for a, b in zip(values, measured[base], strict=True)]
        for name, values in measured.items()
        if name != base
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and number."""
    low, median, high = (float(f"{q:.4g}") for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "quartiles": [low, high], "n": len(values)}


class Stopwatch:
    """Adds up the seconds spent in wrapped functions by label. Nested calls count for the outer one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def wrap(self, label: str, function: Callable[..., Any], *, nested: bool = False) -> Callable[..., Any]:
        """The function, timed. `nested`: it is counted under its own label wherever it is called."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside and not nested:
                return function(*args, **kwargs)
            before, self._inside = self._inside, True
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - started
                self._inside = before

        return timed


@contextmanager
def timed_engine(watch: Stopwatch) -> Iterator[None]:
    """Guards attached within are timed: hooks as "hooks", its end as "finish", its last pass as "flush"."""
    from guard.engines.transformers import TransformersEngine as Engine

    names = (*TIMED, "_stopping_criterion", "finish", "_read_last")
    original = {name: getattr(Engine, name) for name in names}
    try:
        for name in TIMED:
            setattr(Engine, name, watch.wrap("hooks", original[name]))
        setattr(Engine, "finish", watch.wrap("finish", original["finish"]))  # noqa: B010  # a method, replaced on purpose
        setattr(Engine, "_read_last", watch.wrap("flush", original["_read_last"], nested=True))  # noqa: B010

        def criterion(engine: Any) -> Any:
            return watch.wrap("hooks", original["_stopping_criterion"](engine).__call__)

        setattr(Engine, "_stopping_criterion", criterion)  # noqa: B010
        yield
    finally:
        for name, function in original.items():
            setattr(Engine, name, function)


# ---- what is measured --------------------------------------------------------------------------------------


class FullSAE:
    """An observer that encodes a whole dictionary (random weights) at every hook point, and no more."""

    def __init__(self, hook_names: Sequence[str], d_in: int, d_sae: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self.weight = {h: torch.randn(d_in, d_sae, generator=generator) / d_in**0.5 for h in hook_names}
        self.bias = torch.zeros(d_sae)
        self.threshold = torch.ones(d_sae)
        self.feature_acts: dict[str, Any] = {}

    def __call__(self, name: str, hidden: Any) -> None:
        import torch

        pre = torch.addmm(self.bias, hidden.flatten(0, 1).float(), self.weight[name])
        self.feature_acts[name] = torch.where(pre > self.threshold, pre, 0.0)


class Bench:
    """The model, the ways of running it, and the arms that are compared."""

    def __init__(self, bank: Path | None) -> None:
        from guard import Guard, Policy, load_model
        from guard.policy import Rule, Threshold

        never = Threshold(probability=0.999999)
        policy = Policy(
            name="observe",
            rules=tuple(Rule(domain=domain, threshold=never, action="flag") for domain in DOMAINS),
        )
        self.loaded = load_model(dtype="float32", device="cpu")
        self.guard = Guard.from_bank(bank, policy=policy)
        hooks = self.guard.bank.manifest.hook_points
        self.full = FullSAE([hook.hook_name for hook in hooks], hooks[0].d_in, D_SAE)
        self.outputs: dict[int, Any] = {}

    def decode(self, batch: int, tokens: int) -> float:
        """Seconds of `model.generate` for `tokens` tokens a row, from the prompt to the guard's reports."""
        model: Any
        tokenizer: Any
        model, tokenizer, _ = self.loaded
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        started = time.perf_counter()
        output = model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        seconds = time.perf_counter() - started
        if not bool((self.outputs.setdefault(batch, output) == output).all()):
            raise RuntimeError("the arms generated different tokens; an observing guard must change nothing")
        return seconds

    def prefill(self) -> float:
        """Seconds of one forward pass over `PREFILL_TOKENS` tokens that fills a cache."""
        import torch
        from transformers import DynamicCache

        model, tokenizer, _ = self.loaded
        ids = tokenizer(PASSAGE * 40, return_tensors="pt")["input_ids"][:, :PREFILL_TOKENS]
        assert ids.shape[1] == PREFILL_TOKENS
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            started = time.perf_counter()
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - started

    def arms(self, run: Callable[[], float]) -> dict[str, Callable[[], float]]:
        """`run` without a guard, with it, and with whole SAEs. Attaching is outside the clock."""

        def plain() -> float:
            return self._settled(run)

        def guarded() -> float:
            with self.guard.attach(self.loaded.model, self.loaded.tokenizer):
                return self._settled(run)

        def full_sae() -> float:
            from guard.capture import Capture

            with Capture(self.loaded.model, self.guard.bank.hook_names, self.full):
                return self._settled(run)

        return {"plain": plain, "guarded": guarded, "full_sae": full_sae}

    def instrumented(self, run: Callable[[], float]) -> dict[str, float]:
        """One guarded `run` with the engine's own time taken apart: seconds by label, and "total"."""
        watch = Stopwatch()
        with timed_engine(watch), self.guard.attach(self.loaded.model, self.loaded.tokenizer):

            def timed() -> float:
                watch.seconds.clear()  # of the pass that settled the caches
                return run()

            total = self._settled(timed)
        return {"hooks": 0.0, "finish": 0.0, "flush": 0.0} | watch.seconds | {"total": total}

    def _settled(self, run: Callable[[], float]) -> float:
        """`run` from the same state, whatever arm ran before: garbage collected, weights lately read."""
        import torch

        gc.collect()
        with torch.inference_mode():
            self.loaded.model(input_ids=torch.full((1, 8), 100), use_cache=False)
        return run()


def measure(bench: Bench, *, tokens: int, pairs: int) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All figures, each a median over `pairs` rounds, and their spread."""
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {}
    runs: dict[str, Callable[[], float]] = {
        "decode_bs1": partial(bench.decode, 1, tokens),
        "decode_bs8": partial(bench.decode, len(PROMPTS), tokens),
        "prefill": bench.prefill,
    }
    for key, run in runs.items():
        measured = interleaved(bench.arms(run), pairs)
        found = {name: spread(values) for name, values in ratios(measured, "plain").items()}
        each = {"prefill": PREFILL_TOKENS, "decode_bs1": tokens, "decode_bs8": tokens * len(PROMPTS)}[key]
        plain_ms = spread([1000 * s / each for s in measured["plain"]])
        detail[key] = {**found, "plain_ms_per_token": plain_ms}
        full_key = "decode_full_sae" if key == "decode_bs1" else f"{key}_full_sae"
        figures[key] = Figure(value=found["guarded"]["median"], unit="ratio", n=pairs)
        figures[full_key] = Figure(value=found["full_sae"]["median"], unit="ratio", n=pairs)
        print(key, found, flush=True)
    for key, run in runs.items():
        taken = [bench.instrumented(run) for _ in range(pairs)]
        shares = spread([t["hooks"] / t["total"] for t in taken])
        flush_ms = spread([1000 * t["flush"] for t in taken])
        implied = spread([t["total"] / (t["total"] - t["hooks"] - t["finish"]) for t in taken])
        detail[f"{key}_hooks"] = {
            "hooks_share": shares,
            "finish_share": spread([t["finish"] / t["total"] for t in taken]),
            "flush_ms": flush_ms,
            "hooks_ms_per_step": spread([1000 * t["hooks"] / (1 if key == "prefill" else tokens) for t in taken]),
            "implied_ratio": implied,
            "implied_ratio_without_flush": spread(
                [(t["total"] - t["flush"]) / (t["total"] - t["hooks"] - t["finish"]) for t in taken]
            ),
        }
        figures[f"{key}_hooks_share"] = Figure(value=shares["median"], unit="share", n=pairs)
        if key == "decode_bs1":
            figures["flush_ms"] = Figure(value=flush_ms["median"], unit="ms", n=pairs)
        print(f"{key}_hooks", detail[f"{key}_hooks"], flush=True)
    return figures, detail


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--bank", type=Path, help="bank folder; the shipped one if left out")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated a row (2 at least)")
    parser.add_argument("--pairs", type=int, default=15, help="rounds of every comparison")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/performance.md")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.pairs < 1:
        parser.error("--tokens must be at least 2 and --pairs at least 1")

    import torch

    from benchmarks.tables import update

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bench = Bench(options.bank)
    figures, detail = measure(bench, tokens=options.tokens, pairs=options.pairs)
    bank = bench.guard.bank
    detail |= {
        "bank": {
            "version": bank.version,
            "content_hash": bank.content_hash,
            "hook_points": {h.hook_name: h.n_selected for h in bank.manifest.hook_points},
        },
        "model": bench.loaded.model_id,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "tokens": options.tokens,
        "prefill_tokens": PREFILL_TOKENS,
        "full_sae": {"d_sae": D_SAE, "hook_points": len(bank.hook_names)},
        "identical_tokens": True,  # the run ends with an error if an arm generates other tokens
    }
    print(write_result("overhead", figures, detail, folder=options.out))
    if options.docs:
        update("overhead", options.out)


if __name__ == "__main__":
    main()
