"""A guard attached to a model: guarded chats and streams, and the judging of texts on their own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from feature_bank.identity import check_identity
from feature_bank.layout import ROLES, Role, chat_ids
from guard.canary import check_canary
from guard.engines.decoding import Sampler, TextStream
from guard.engines.transformers import TransformersEngine
from guard.errors import GuardError
from guard.events import Completion, FinishReason, SequenceReport, StreamEvent, TextScore, Trace
from guard.judge import TOP_FEATURES
from guard.monitor import Monitor
from guard.state import BatchState
from guard.text_scoring import TextScorer

if TYPE_CHECKING:
    from guard.core import Guard

Messages = Sequence[Mapping[str, str]]


class AttachedGuard:
    """The hooks are in place from construction until `close()`; one thread at a time.

    While it is open `model.generate` is guarded too, and so are `model.generate_batch` and the managers of continuous
    batching; the reports of the last call, or of the last manager, lie in `reports`.
    """

    def __init__(self, guard: Guard, model: Any, tokenizer: Any) -> None:
        check_identity(model, tokenizer, guard.bank.manifest.model)
        device = next(model.parameters()).device
        self.guard = guard
        self.model = model
        self.tokenizer = tokenizer
        self.monitor = Monitor(guard.bank, guard.policy, device)
        self._scorer = TextScorer(self.monitor, model, tokenizer)
        self._engine = TransformersEngine(model, tokenizer, self.monitor, guard.metrics)
        try:
            with self._engine.paused():
                check_canary(guard.bank, self.monitor.encoder, model, tokenizer)
        except BaseException:
            self._engine.close()
            raise
        self._closed = False

    def __enter__(self) -> AttachedGuard:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks. The model is then exactly what it was; calling twice is harmless.

        Continuous batching that is running is stopped first, and its requests fail.
        """
        if not self._closed:
            self._closed = True
            self._engine.close()

    @property
    def engine(self) -> TransformersEngine:
        """The hooks on the model."""
        return self._engine

    @property
    def reports(self) -> list[SequenceReport]:
        """The reports of the last generation, one a sequence, in the order of the batch.

        Under continuous batching: of the requests that have finished, in the order in which they were added.
        """
        return self._engine.reports

    @property
    def errors(self) -> list[str]:
        """Internal errors of the last generation, which `on_error` of the policy has answered."""
        return list(self._engine.errors)

    @property
    def context_length(self) -> int:
        """Most tokens the model takes, prompt and answer together."""
        return int(self.model.config.max_position_embeddings)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids of a chat, ready for the answer. What messages say cannot forge control tokens.

        Raises GuardError if the chat is empty, malformed or leaves no room for an answer.
        """
        ids = self.rendered(messages)
        if len(ids) >= self.context_length:
            raise GuardError(f"the chat has {len(ids)} tokens; the model takes {self.context_length}, answer included")
        return ids

    def rendered(self, messages: Messages) -> list[int]:
        """`prompt_ids`, however long it is."""
        from jinja2 import TemplateError

        _check_messages(messages)
        try:
            return chat_ids(self.tokenizer, messages, add_generation_prompt=True).ids
        except (ValueError, TemplateError) as e:
            raise GuardError(f"the model's chat template does not take these messages: {e}") from e

    def stream(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[StreamEvent]:
        """Generate an answer token by token. A token's text is yielded only after the token has been judged.

        When a rule blocks, the last event carries the refusal text and `finish_reason="content_filter"`; the
        text of the deciding token is never shown. A blocking rule decides on a response that is shorter than
        its evidence at the response's end, so the first tokens are held back until it could have decided.
        `reports[0]` is the report after the last event, or after the stream was closed.

        Raises GuardError when the guard is detached or used for something else while the stream is under way.
        """
        prompt = self.prompt_ids(messages)
        return self._stream(prompt, max_new_tokens, Sampler(temperature=temperature, top_p=top_p, seed=seed), stop)

    def _stream(
        self, prompt: list[int], max_new_tokens: int, sampler: Sampler, stop: Sequence[str]
    ) -> Iterator[StreamEvent]:
        from transformers import DynamicCache

        self._check_open()
        engine, text = self._engine, TextStream(self.tokenizer, stop)
        limit = min(max_new_tokens, self.context_length - len(prompt))
        hold = self.monitor.hold_tokens
        cache = DynamicCache(config=self.model.config)
        generated: list[int] = []
        reason: FinishReason | None = None
        told, shown = 0, ""
        engine.start((uuid.uuid4().hex,))
        try:
            logits = self._forward(prompt, cache)
        except BaseException:
            engine.drop()
            raise
        state = self._own_state(engine.state)
        try:
            while reason is None:
                if any(state.blocked):
                    reason = "content_filter"
                elif len(generated) >= limit:
                    reason = "length"
                elif (token := sampler.next_token(logits)) in engine.end_ids:
                    reason = "stop"
                else:
                    generated.append(token)
                    if len(generated) == limit:  # its text waits until `finish` has judged it
                        break
                    logits = self._forward([token], cache)
                    if any(state.blocked):
                        continue
                    shown += text.push(token)
                    if text.stopped:
                        reason = "stop"
                    elif len(generated) >= hold and (shown or len(state.verdicts[0]) > told):
                        news, told = tuple(state.verdicts[0][told:]), len(state.verdicts[0])
                        yield StreamEvent(
                            token_id=token, text=shown, verdicts=news, scores=self.monitor.scores(state, 0)
                        )
                        shown = ""
                        self._own_state(state)
            engine.finish(torch.tensor([generated], dtype=torch.long))
            if any(state.blocked):
                reason, shown = "content_filter", self.guard.policy.refusal
            else:
                if reason is None:
                    shown += text.push(generated[-1])
                    reason = "stop" if text.stopped else "length"
                shown += text.flush()
            news = tuple(state.verdicts[0][told:])
            scores = self.monitor.scores(state, 0)
            yield StreamEvent(token_id=None, text=shown, verdicts=news, scores=scores, finish_reason=reason)
        except GeneratorExit:  # the reader has had enough; all that was generated has been judged
            if engine.state is state and not engine.reports:
                engine.finish(torch.tensor([generated], dtype=torch.long))
            raise
        finally:
            if engine.state is state:
                engine.drop()

    def _own_state(self, state: BatchState | None) -> BatchState:
        """The state, if it is still that of the generation in work; a stream cannot go on unguarded without it."""
        self._check_open()
        if state is None or self._engine.state is not state:
            raise GuardError("another generation has begun on this guard; it serves one at a time")
        return state

    @torch.inference_mode()
    def _forward(self, ids: list[int], cache: Any) -> torch.Tensor:
        output = self.model(
            input_ids=torch.tensor([ids], device=self.monitor.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def chat(self, messages: Messages, **options: Any) -> Completion:
        """One guarded answer; `options` are those of `stream`."""
        prompt_tokens = len(self.prompt_ids(messages))
        events = list(self.stream(messages, **options))
        reason = events[-1].finish_reason
        assert reason is not None
        refused = reason == "content_filter"
        report = self.reports[0]
        return Completion(
            text=events[-1].text if refused else "".join(event.text for event in events),
            finish_reason=reason,
            report=report,
            prompt_tokens=prompt_tokens,
            completion_tokens=report.tokens_generated,
        )

    def complete(self, chats: Sequence[Messages], *, max_new_tokens: int = 256) -> list[Completion]:
        """Greedy answers to several chats as one batch; each is judged, steered or stopped on its own."""
        self._check_open()
        prompts = [self.prompt_ids(messages) for messages in chats]
        if not prompts:
            return []
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._engine.end_ids[0]
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.monitor.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.monitor.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(max_new_tokens, self.context_length - width),
            do_sample=False,
            pad_token_id=pad,
        )
        completions = []
        for row, report in enumerate(self.reports):
            answer = output[row, width:].tolist()
            ended = next((i for i, token in enumerate(answer) if token in self._engine.end_ids), None)
            refused = report.action == "block"
            text = self.tokenizer.decode(answer[:ended], skip_special_tokens=True)
            completions.append(
                Completion(
                    text=self.guard.policy.refusal if refused else text,
                    finish_reason="content_filter" if refused else "length" if ended is None else "stop",
                    report=report,
                    prompt_tokens=len(prompts[row]),
                    completion_tokens=report.tokens_generated,
                )
            )
        return completions

    def score(self, texts: Sequence[str], roles: Sequence[Role] | None = None) -> list[TextScore]:
        """Judge texts on their own, without generating: each as a user's prompt, or in the given role."""
        self._check_open()
        chosen: Sequence[Role] = roles or ["prompt"] * len(texts)
        if len(chosen) != len(texts):
            raise GuardError(f"{len(texts)} texts but {len(chosen)} roles; give one role a text")
        for role in chosen:
            _check_role(role)
        with self._engine.paused():
            return self._scorer.score(texts, chosen)

    def trace(self, text: str, role: Role = "prompt", *, top: int | None = TOP_FEATURES) -> Trace:
        """Judge one text and keep what every token showed: its `top` strongest features, or all that are active."""
        self._check_open()
        _check_role(role)
        with self._engine.paused():
            return self._scorer.trace(text, role, top=top)

    def _check_open(self) -> None:
        if self._closed:
            raise GuardError("the guard has been detached; attach it again")


def _check_messages(messages: Messages) -> None:
    if not messages:
        raise GuardError("a chat needs at least one message")
    for number, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise GuardError(f"message {number}, field {field!r}: expected a text, got {message.get(field)!r}")
        if not message["role"].isidentifier():  # the template would take its text for control tokens
            raise GuardError(f"message {number}, field 'role': {message['role']!r} is no role")


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise GuardError(f"role {role!r} is not known; use one of {', '.join(ROLES)}")
