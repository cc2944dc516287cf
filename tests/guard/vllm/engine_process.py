"""A vLLM engine in a process of its own, for tests: `LLM` reads its environment once, and prints what it likes.

Run as a program it makes the engine that its first argument describes and answers commands, a JSON line each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
EXTENSION = "tests.guard.vllm.worker_probe.Probe"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class EngineProcess:
    """The engine, started; `close()` ends it."""

    def __init__(self, model: Path, log: Path, *, guard: dict[str, str] | None, **options: Any) -> None:
        self.log = log
        if guard is not None:
            options["worker_extension_cls"] = EXTENSION
        described = json.dumps({"model": str(model), "max_model_len": 1024, "max_num_seqs": 32, **options})
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.guard.vllm.engine_process", described],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env=environment(guard or {}),
            )
        try:
            self._answer()
        except RuntimeError:
            self.close()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def ask(self, **command: Any) -> Any:
        """The answer to one command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def chat(self, prompts: list[Any], params: Any, **options: Any) -> list[list[dict[str, Any]]]:
        """The answers to user prompts: of each prompt, of each choice, its text, tokens, end and report."""
        return self.ask(op="chat", prompts=prompts, params=params, options=options)

    def rpc(self, method: str, *args: Any) -> Any:
        """What a method of the probe returns on the first worker."""
        return self.ask(op="rpc", method=method, args=args)[0]

    def close(self) -> None:
        """End the engine."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _told(self) -> str:
        """Of the log what matters: the errors of all processes, and its end."""
        text = self.log.read_text()
        errors = [line for line in text.splitlines() if "Error: " in line]
        return "\n".join([*errors[-20:], text[-3000:]])

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(60)
            raise RuntimeError(f"the engine ended:\n{self._told()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}\n{self._told()}")
        return answer["ok"]


def environment(guard: dict[str, str]) -> dict[str, str]:
    """That of an engine's process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAILGUARD_", "VLLM_"))}
    for name in ("SAILGUARD_CACHE", "VLLM_CACHE_ROOT"):
        if name in os.environ:
            kept[name] = os.environ[name]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, **ENVIRONMENT, "PYTHONPATH": path, **guard}


def _told(output: Any) -> dict[str, Any]:
    report = getattr(output, "sailguard", None)
    return {
        "text": output.text,
        "ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "report": None if report is None else report.to_dict(),
    }


def _serve(options: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes to the log

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        from vllm import LLM, SamplingParams

        llm = LLM(**options)
    except Exception as e:  # whatever it is, the test is to see it
        answer(error=f"{type(e).__name__}: {e}")
        raise
    answer(ok="ready")
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["op"] == "rpc":
                answer(ok=llm.collective_rpc(command["method"], args=tuple(command["args"])))
            elif command["op"] == "metrics":
                import prometheus_client

                answer(ok=prometheus_client.generate_latest().decode())
            else:
                given = command["params"]
                params = [SamplingParams(**p) for p in given] if isinstance(given, list) else SamplingParams(**given)
                chats = [[{"role": "user", "content": prompt}] for prompt in command["prompts"]]
                found = llm.chat(chats, params, use_tqdm=False, **command["options"])
                read = [(len(output.prompt_token_ids), output.num_cached_tokens) for output in found]
                told = [[_told(choice) for choice in output.outputs] for output in found]
                for choices, (prompt, cached) in zip(told, read, strict=True):
                    choices[0] |= {"prompt": prompt, "cached": cached}
                answer(ok=told)
        except Exception as e:  # noqa: BLE001  # the test is to see it
            answer(error=f"{type(e).__name__}: {e}")


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
