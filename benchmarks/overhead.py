"""What the guard costs in time: decoding and prefill with it over the same without it, 1.00 = free.

    python -m benchmarks.overhead [--bank FOLDER] [--tokens 128] [--rounds 4] [--docs]

One process, one set of weights: the arms (unguarded, unguarded once more, guarded with and without its compiled
step, and ones that encode a whole SAE at the same hook points) take turns token by token, in an order that turns round,
so that a processor that slows down for a while does so for all of them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, Figure, write_result
from feature_bank.taxonomy import DOMAINS
from guard import Guard

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

    Each round begins with another arm, and odd ones run backwards: over the rounds every arm stands in every
    place alike, so neither a drift nor what the arm before leaves in the caches favours one.
    """
    names = list(arms)
    for arm in arms.values():
        arm()
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        first = number // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order[:: -1 if number % 2 else 1]:
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
    """Median, quartiles, the 95 % interval of the median (bootstrap), and number."""
    low, median, high = (float(f"{q:.4g}") for q in np.quantile(values, (0.25, 0.5, 0.75)))
    drawn = np.random.default_rng(0).choice(np.asarray(values), (1000, len(values)))
    interval = [float(f"{q:.4g}") for q in np.quantile(np.median(drawn, axis=1), (0.025, 0.975))]
    return {"median": median, "quartiles": [low, high], "interval": interval, "n": len(values)}


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


def resident_mb() -> float:
    """Memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


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


class SaeLens:
    """The same, by the SAE class of sae-lens: what a hook around its `encode` costs."""

    def __init__(self, hook_names: Sequence[str], d_in: int, d_sae: int) -> None:
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

        self.saes = {h: JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, device="cpu")) for h in hook_names}
        self.feature_acts: dict[str, Any] = {}

    def __call__(self, name: str, hidden: Any) -> None:
        self.feature_acts[name] = self.saes[name].encode(hidden)


class Decoding:
    """One greedy generation of a batch, a token a call. No row ends: the end tokens are never chosen."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], end_ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        self._model, self._end_ids = model, list(end_ids)
        self._cache = DynamicCache(config=model.config)
        self._mask = inputs["attention_mask"]
        self._ids = inputs["input_ids"]
        self.tokens: list[Any] = []
        self.step()  # the prompt

    def step(self) -> float:
        """Seconds from one token of every row to the next."""
        import torch

        with torch.inference_mode():
            started = time.perf_counter()
            positions = self._mask.cumsum(1)[:, -self._ids.shape[1] :] - 1
            output = self._model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=positions.clamp_min(0),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1]
            logits[:, self._end_ids] = -torch.inf
            self._ids = logits.argmax(-1, keepdim=True)
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
            seconds = time.perf_counter() - started
        self.tokens.append(self._ids)
        return seconds


class Bench:
    """The model, and the arms that are compared: bodies of their own around one set of weights."""

    def __init__(self, bank: Path | None) -> None:
        from guard import Policy, load_model
        from guard.native import library
        from guard.policy import Rule, Threshold

        never = Threshold(probability=0.999999)
        policy = Policy(
            name="observe",
            rules=tuple(Rule(domain=domain, threshold=never, action="flag") for domain in DOMAINS),
        )
        self.bank = bank
        self.loaded = load_model(dtype="float32", device="cpu")
        self.guard = Guard.from_bank(bank, policy=policy)
        hooks = self.guard.bank.manifest.hook_points
        shape = [hook.hook_name for hook in hooks], hooks[0].d_in, D_SAE
        self.observers: dict[str, Callable[[str, Any], None]] = {"full_sae": FullSAE(*shape)}
        with suppress(ImportError):
            self.observers["sae_lens"] = SaeLens(*shape)
        self.guarded = ("guarded",) if library() is None else ("guarded", "torch")

    @contextmanager
    def models(self) -> Iterator[dict[str, Any]]:
        """Arm -> its model. The weights are shared; hooks are not. "torch" is the guard without its compiled step."""
        from guard.capture import Capture

        model = self.loaded.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        names = ("plain", "again", *self.guarded, *self.observers)
        bodies = {name: copy.deepcopy(model, dict(shared)) for name in names}
        with ExitStack() as stack:
            for name in self.guarded:
                attached = stack.enter_context(self.guard.attach(bodies[name], self.loaded.tokenizer))
                if name == "torch":
                    attached.monitor._compiled = None
            for name, observer in self.observers.items():
                stack.enter_context(Capture(bodies[name], self.guard.bank.hook_names, observer))
            yield bodies

    def inputs(self, batch: int) -> Any:
        """The prompts, padded to one length."""
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:batch]]
        return self.loaded.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )

    def decode(self, batch: int, tokens: int, rounds: int) -> dict[str, list[float]]:
        """Arm -> seconds of every step of `rounds` generations, whose arms take turns step by step."""
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            with self.models() as models:
                arms = {
                    name: Decoding(model, self.inputs(batch), self.loaded.tokenizer.all_special_ids)
                    for name, model in models.items()
                }
                gc.collect()
                for name, seconds in interleaved({name: arm.step for name, arm in arms.items()}, tokens).items():
                    found.setdefault(name, []).extend(seconds)
                for arm in arms.values():
                    if not all(bool((a == b).all()) for a, b in zip(arm.tokens, arms["plain"].tokens, strict=True)):
                        raise RuntimeError("the arms generated different tokens; an observer must change nothing")
        return found

    def prefill(self, rounds: int) -> dict[str, list[float]]:
        """Arm -> seconds of one forward pass over `PREFILL_TOKENS` tokens that fills a cache, `rounds` times."""
        with self.models() as models:
            arms = {name: partial(self._prefill, model) for name, model in models.items()}
            return interleaved(arms, rounds)

    def _prefill(self, model: Any) -> float:
        import torch
        from transformers import DynamicCache

        ids = self.loaded.tokenizer(PASSAGE * 40, return_tensors="pt")["input_ids"][:, :PREFILL_TOKENS]
        assert ids.shape[1] == PREFILL_TOKENS
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            started = time.perf_counter()
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - started

    def memory(self, tokens: int) -> float:
        """MB (10^6 bytes) by which this process grows when a bank is loaded and attached, and has watched what the
        model generated unguarded before, of the largest batch and a whole prompt."""

        def work() -> None:
            self.loaded.model.generate(**self.inputs(len(PROMPTS)), max_new_tokens=tokens, do_sample=False)
            self._prefill(self.loaded.model)
            gc.collect()

        for _ in range(2):
            work()
        before = resident_mb()
        with Guard.from_bank(self.bank, policy=self.guard.policy).attach(self.loaded.model, self.loaded.tokenizer):
            work()
            return resident_mb() - before

    def instrumented(self, batch: int, tokens: int) -> dict[str, float]:
        """One guarded `model.generate` with the engine's own time taken apart: seconds by label, and "total"."""
        watch = Stopwatch()
        with timed_engine(watch), self.guard.attach(self.loaded.model, self.loaded.tokenizer):
            inputs = self.inputs(batch)
            self.loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
            gc.collect()
            watch.seconds.clear()
            started = time.perf_counter()
            self.loaded.model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            total = time.perf_counter() - started
        return {"hooks": 0.0, "finish": 0.0, "flush": 0.0} | watch.seconds | {"total": total}

    def instrumented_prefill(self) -> dict[str, float]:
        """The same of one guarded forward pass over `PREFILL_TOKENS` tokens."""
        watch = Stopwatch()
        with timed_engine(watch), self.guard.attach(self.loaded.model, self.loaded.tokenizer):
            self._prefill(self.loaded.model)
            gc.collect()
            watch.seconds.clear()
            return {"total": self._prefill(self.loaded.model)} | watch.seconds


def measure(bench: Bench, *, tokens: int, rounds: int, prefills: int) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All figures, each a median, and their spread."""
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {}
    figures["memory"] = Figure(value=round(bench.memory(tokens), 1), unit="MB", n=1)
    print("memory", figures["memory"], flush=True)
    batches = {"decode_bs1": 1, "decode_bs8": len(PROMPTS)}
    suffixes = {"guarded": "", "again": "_unguarded_again", "torch": "_through_torch"}
    for key in (*batches, "prefill"):
        measured = bench.prefill(prefills) if key == "prefill" else bench.decode(batches[key], tokens, rounds)
        each = PREFILL_TOKENS if key == "prefill" else batches[key]
        detail[key] = {name: spread(values) for name, values in ratios(measured, "plain").items()}
        for name, found in detail[key].items():
            figures[key + suffixes.get(name, f"_{name}")] = Figure(value=found["median"], unit="ratio", n=found["n"])
        detail[key]["plain_ms_per_token"] = spread([1000 * s / each for s in measured["plain"]])
        print(key, detail[key], flush=True)
    figures["decode_full_sae"] = figures["decode_bs1_full_sae"]
    if "decode_bs1_sae_lens" in figures:
        figures["decode_nnsight_or_sae_lens"] = figures["decode_bs1_sae_lens"]
    for key, batch in batches.items():
        taken = [bench.instrumented(batch, tokens) for _ in range(3)]
        share = spread([t["hooks"] / t["total"] for t in taken])
        flush_ms = spread([1000 * t["flush"] for t in taken])
        detail[f"{key}_own"] = {
            "hooks_share": share,
            "hooks_ms_per_step": spread([1000 * t["hooks"] / tokens for t in taken]),
            "finish_share": spread([t["finish"] / t["total"] for t in taken]),
            "flush_ms": flush_ms,
            "ratio": spread([t["total"] / (t["total"] - t["hooks"] - t["finish"]) for t in taken]),
        }
        figures[f"{key}_own_share"] = Figure(value=share["median"], unit="share", n=share["n"])
        figures[f"{key}_flush_ms"] = Figure(value=flush_ms["median"], unit="ms", n=flush_ms["n"])
        print(f"{key}_own", detail[f"{key}_own"], flush=True)
    passes = [bench.instrumented_prefill() for _ in range(9)]
    share = spread([t["hooks"] / t["total"] for t in passes])
    detail["prefill_own"] = {"hooks_share": share, "hooks_ms": spread([1000 * t["hooks"] for t in passes])}
    figures["prefill_own_share"] = Figure(value=share["median"], unit="share", n=share["n"])
    print("prefill_own", detail["prefill_own"], flush=True)
    return figures, detail


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--bank", type=Path, help="bank folder; the shipped one if left out")
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated a row (2 at least)")
    parser.add_argument("--rounds", type=int, default=4, help="generations of every arm; each gives TOKENS pairs")
    parser.add_argument("--prefills", type=int, default=40, help="pairs of prefill")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/performance.md")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or options.rounds < 1 or options.prefills < 1:
        parser.error("--tokens must be at least 2, --rounds and --prefills at least 1")

    import torch

    from benchmarks.tables import update
    from guard.native import library

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bench = Bench(options.bank)
    figures, detail = measure(bench, tokens=options.tokens, rounds=options.rounds, prefills=options.prefills)
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
        "compiled_step": library() is not None,
        "tokens": options.tokens,
        "prefill_tokens": PREFILL_TOKENS,
        "full_sae": {"d_sae": D_SAE, "hook_points": len(bank.hook_names)},
        "identical_tokens": True,  # the run ends with an error if an arm generates other tokens
    }
    packages = ["sae-lens"] if "sae_lens" in bench.observers else []
    print(write_result("overhead", figures, detail, packages=packages, folder=options.out))
    if options.docs:
        update("overhead", options.out)


if __name__ == "__main__":
    main()
