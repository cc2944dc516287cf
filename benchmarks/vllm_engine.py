"""One engine of `benchmarks.vllm`, in a process of its own: it answers closed-loop loads, a JSON line each.

    python -m benchmarks.vllm_engine '{"model": ..., ...}' [hooks]

With `hooks` it has the naive guard: Python hooks on the layers, which encode a whole SAE at every hook point, and
look at the largest activations on the host.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from benchmarks.overhead import D_SAE, PROMPTS

HOOKED = (6, 14, 22)  # where the shipped bank looks


class NaiveHooks:
    """Mixed into the worker: what one would write first."""

    def place_naive_hooks(self) -> int:
        """Put a hook on each of the layers. Returns how many there are."""
        import torch

        worker: Any = self
        layers = worker.model_runner.model.model.layers
        width = worker.model_runner.model.config.hidden_size
        generator = torch.Generator().manual_seed(0)
        self.fired = 0
        for layer in HOOKED:
            weight = torch.randn(width, D_SAE, generator=generator)

            def hook(_: Any, _args: Any, output: Any, weight: Any = weight) -> None:
                hidden, residual = output
                acts = ((hidden + residual).float() @ weight).relu()
                self.fired += acts.amax(1).tolist() != []

            layers[layer].register_forward_hook(hook)
        return len(HOOKED)

    def naive_hooks_fired(self) -> int:
        """How often they have."""
        return self.fired


async def load(engine: Any, *, concurrency: int, requests: int, tokens: int) -> list[dict[str, Any]]:
    """`requests` answers of `tokens` tokens, `concurrency` at a time. Of each, by the machine's clock: when it was
    asked for, and when which of its tokens came."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    tokenizer = engine.get_tokenizer()
    tokenizer = await tokenizer if asyncio.iscoroutine(tokenizer) else tokenizer
    numbers = iter(range(requests))
    answers: list[dict[str, Any]] = []

    async def client() -> None:
        for number in numbers:
            chat = [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            asked = time.monotonic()
            came: list[tuple[float, int]] = []
            async for output in engine.generate(text, params, f"{asked}-{number}"):
                if output.outputs[0].token_ids:
                    came.append((time.monotonic(), len(output.outputs[0].token_ids)))
            if sum(n for _, n in came) != tokens:
                raise RuntimeError(f"not {tokens} tokens came, but {came}")
            answers.append({"asked": asked, "came": came, "ended": time.monotonic()})

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers


async def serve(options: dict[str, Any], naive: bool) -> None:
    """Make the engine, and answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    if naive:
        options = {**options, "worker_extension_cls": "benchmarks.vllm_engine.NaiveHooks"}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    if naive:
        await engine.collective_rpc("place_naive_hooks")
    answer("ready")
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        if command == "fired":
            answer((await engine.collective_rpc("naive_hooks_fired"))[0] > 0)
        else:
            answer(await load(engine, **command))
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1]), "hooks" in sys.argv[2:]))
