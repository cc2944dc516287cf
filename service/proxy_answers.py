"""A proxied answer that lies there whole: every choice is judged before any of it is passed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from service.errors import AsciiJSONResponse
from service.proxy_judging import Finding
from service.proxy_texts import answer_texts, joined
from service.schemas import ACTION_HEADER, strongest, usage
from service.upstream import broken

if TYPE_CHECKING:
    from starlette.responses import Response

    from service.proxy_judging import Proxied
    from service.proxy_texts import Asked
    from service.wire import Wire

__all__ = ["HEAD", "judged_answer", "refused_answer", "refused_events"]

HEAD = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
"""Fields of an answer that say where it comes from."""


async def judged_answer(proxied: Proxied, answer: object, wire: Wire, headers: Mapping[str, str]) -> Response:
    """The upstream's answer with the refusal in place of each choice that is blocked.

    Raises `ApiError` (502) for an answer of another shape.
    """
    choices = _choices(answer)
    assert isinstance(answer, dict)
    # What stands beside the choices is judged as one text more.
    beside = Finding()
    items = [(proxied.choice(index), text) for index, choice in enumerate(choices) for text in answer_texts(choice)]
    rest = joined(answer, without={"choices", "usage", "sailguard", *HEAD})
    if rest.strip():
        items.append((beside, rest))
    await proxied.judge(items, ["response"] * len(items))
    shown = []
    for number, choice in enumerate(choices):
        index = choice["index"] if isinstance(choice.get("index"), int) else number
        finding = proxied.choice(number)
        proxied.count("response", finding)
        shown.append(wire.choice(index, proxied.engine.policy.refusal, "content_filter") if finding.blocked else choice)
    block = proxied.block(range(len(choices)))
    if beside.action != "allow":
        block["action"] = strongest([block["action"], beside.action])
        block["verdicts"] += [verdict.to_dict() for verdict in beside.verdicts]
    kept = answer
    if block["action"] == "block":
        kept = {name: value for name, value in answer.items() if name in (*HEAD, "usage")}
    proxied.record.action = block["action"]
    return AsciiJSONResponse(
        {**kept, "choices": shown, "sailguard": block}, headers={**headers, ACTION_HEADER: block["action"]}
    )


def refused_answer(proxied: Proxied, asked: Asked, wire: Wire) -> Response:
    """The answer to a prompt that was blocked, as the server itself gives it."""
    numbers = range(asked.choices)
    choices = [wire.choice(index, proxied.engine.policy.refusal, "content_filter") for index in numbers]
    block = proxied.block(numbers)
    body = wire.whole(choices, usage=usage(proxied.prompt.tokens, 0), sailguard=block)
    return AsciiJSONResponse(body, headers={ACTION_HEADER: block["action"]})


def refused_events(proxied: Proxied, asked: Asked, wire: Wire) -> list[dict[str, Any]]:
    """The events of the answer to a prompt that was blocked, but for the last, [DONE]."""
    events = []
    for index in range(asked.choices):
        opening = wire.opening(index)
        if opening is not None:
            events.append(wire.chunk([opening]))
        events.append(wire.chunk([wire.delta(index, proxied.engine.policy.refusal)]))
        ending = wire.ending(index, "content_filter")
        events.append(wire.chunk([ending], sailguard=proxied.block([index])))
    if asked.include_usage:
        events.append(wire.chunk([], usage=usage(proxied.prompt.tokens, 0)))
    return events


def _choices(answer: object) -> list[dict[str, Any]]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise broken("its answer holds no list of choices")
    return choices
