"""A proxied answer that comes as a stream: what the upstream says waits until it has been judged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.errors import ApiError
from service.proxy_answers import HEAD
from service.proxy_judging import Growing
from service.proxy_texts import joined
from service.upstream import broken, parsed

if TYPE_CHECKING:
    from service.proxy_judging import Proxied
    from service.upstream import Reply
    from service.wire import Wire

__all__ = ["DONE", "ProxiedStream"]

DONE = "[DONE]"

_TOKEN_CHARACTERS = 4
_LONGEST_WAIT = 0.25
_PING_SECONDS = 15.0
_MOST_CHOICES = 128
_LONGEST_REASON = 64
# Fields of a delta that are text; the others hold parts of calls, or are not known and so not passed on.
_TEXTS = ("reasoning_content", "reasoning", "content", "refusal")
_CALLS = ("tool_calls", "function_call")
# Of these every delta repeats the whole, while other strings come in pieces.
_WHOLE = frozenset({"id", "type", "name", "index"})


@dataclass(slots=True)
class _Text:
    """One field of a choice's text."""

    name: str
    growing: Growing = field(default_factory=Growing)
    pending: str = ""
    deltas: int = 0
    """Of which `pending` consists."""
    closed: bool = False
    late: str = ""
    """What came after it had ended; it is judged at the choice's end, together with all before it."""


@dataclass(slots=True)
class _Choice:
    """What is known of one choice while it comes."""

    head: dict[str, Any]
    texts: dict[str, _Text] = field(default_factory=dict)
    active: _Text | None = None
    ready: list[tuple[_Text, str]] = field(default_factory=list)
    """Ends of texts that are to be judged."""
    calls: dict[str, Any] = field(default_factory=dict)
    since: float | None = None
    """When the text that waits longest came."""
    finish: str | None = None
    finished: bool = False
    """Whether the upstream has ended it."""
    usage: Any = None
    told: bool = False
    """Whether its end was sent."""


class ProxiedStream:
    """Reads the reply's events and sends judged ones.

    send: sends one event. ping: keeps the connection alive while nothing is sent. choices: how many there will be.
    hold_back: tokens that are collected before they are judged, unless a quarter of a second passes.
    """

    def __init__(
        self,
        proxied: Proxied,
        reply: Reply,
        wire: Wire,
        *,
        choices: int,
        hold_back: int,
        send: Callable[[dict[str, Any] | str], Awaitable[None]],
        ping: Callable[[], Awaitable[None]],
    ) -> None:
        self._proxied = proxied
        self._reply = reply
        self._events = reply.events()
        self._coming: asyncio.Task[str | None] | None = None
        self._wire = wire
        self._expected = choices
        self._hold_back = hold_back
        self._send_event = send
        self._ping = ping
        self._choices: dict[int, _Choice] = {}
        self._sent = 0.0

    async def run(self) -> None:
        """Send the answer, to its [DONE]. Raises `ApiError` if the upstream fails or breaks off."""
        loop = asyncio.get_running_loop()
        self._sent = loop.time()
        try:
            while not self._enough():
                if self._coming is None:
                    self._coming = asyncio.create_task(self._next())
                await asyncio.wait([self._coming], timeout=max(self._next_time() - loop.time(), 0.0))
                if self._coming.done():
                    data, self._coming = self._coming.result(), None
                    if data == DONE:
                        await self._end()
                        break
                    if data is None:
                        if not self._choices or not all(choice.finished for choice in self._choices.values()):
                            raise broken("its answer broke off")
                        break
                    await self._take(data, loop.time())
                await self._judge(loop.time())
                if loop.time() - self._sent >= _PING_SECONDS:
                    self._sent = loop.time()
                    await self._ping()
        finally:
            await self._stop()
        await self._send(DONE)

    async def _next(self) -> str | None:
        return await anext(self._events, None)

    async def _stop(self) -> None:
        """Hang up on the upstream: it must not go on generating for nobody."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.cancel()
            await asyncio.wait([coming])
        await self._events.aclose()
        await self._reply.close()

    def _enough(self) -> bool:
        """Whether all choices are over because of a block. Otherwise there is still the usage to come."""
        over = [index for index, choice in self._choices.items() if choice.told]
        blocked = any(self._proxied.choice(index).blocked for index in over)
        return blocked and len(over) >= self._expected

    def _next_time(self) -> float:
        waiting = [choice.since + _LONGEST_WAIT for choice in self._choices.values() if choice.since is not None]
        return min([*waiting, self._sent + _PING_SECONDS])

    async def _take(self, data: str, now: float) -> None:
        """Take one event of the upstream's in."""
        chunk = parsed(data)
        if not isinstance(chunk, dict):
            raise broken("an event of its stream is no object")
        if chunk.get("error"):
            raise _passed_on(chunk["error"])
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            return
        head = {name: chunk[name] for name in HEAD if name in chunk}
        if not choices and chunk.get("usage"):
            await self._send({**self._head(head), "choices": [], "usage": chunk["usage"]})
        for part in choices:
            if not isinstance(part, dict):
                raise broken("a choice in its stream is no object")
            await self._take_part(part, head, chunk.get("usage"), now)

    async def _take_part(self, part: dict[str, Any], head: dict[str, Any], usage: Any, now: float) -> None:
        index = part.get("index", 0)
        if not isinstance(index, int) or not 0 <= index < _MOST_CHOICES:
            raise broken("a choice in its stream has no proper index")
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(head)
            opening = self._wire.opening(index)
            if opening is not None:
                await self._send({**self._head(head), "choices": [opening]})
        choice.head = head
        if choice.finished or choice.told:
            return  # it has ended, or was blocked; whatever still comes is nobody's
        delta = part["delta"] if isinstance(part.get("delta"), dict) else {}
        for name in _TEXTS:
            if isinstance(delta.get(name), str):
                self._add(choice, name, delta[name], now)
        if isinstance(part.get("text"), str):  # of a completion
            self._add(choice, "text", part["text"], now)
        for name in _CALLS:
            if delta.get(name):
                choice.calls[name] = _merged(choice.calls.get(name), delta[name])
        reason = part.get("finish_reason")
        if reason is not None:
            choice.finish = str(reason)[:_LONGEST_REASON]
            choice.finished, choice.usage = True, usage

    def _add(self, choice: _Choice, name: str, piece: str, now: float) -> None:
        if not piece:
            return
        text = choice.texts.setdefault(name, _Text(name))
        if text.closed:
            text.late += piece
            return
        if choice.active is not None and choice.active is not text:
            # The reasoning is over when the answer begins: its last words must not come behind the answer's first.
            before = choice.active
            before.closed = True
            choice.ready.append((before, before.pending))
            before.pending, before.deltas = "", 0
        choice.active = text
        text.pending += piece
        text.deltas += 1
        choice.since = now if choice.since is None else choice.since

    async def _judge(self, now: float) -> None:
        """Judge what is due of every choice, in one turn, and send what may be sent."""
        due = [(index, choice) for index, choice in self._choices.items() if not choice.told and self._due(choice, now)]
        if not due:
            return
        pushes: list[tuple[int, Growing, str, bool]] = []
        names: list[str] = []
        for index, choice in due:
            for text, piece in choice.ready:
                pushes.append((index, text.growing, piece, True))
                names.append(text.name)
            choice.ready.clear()
            choice.since = None
            active = choice.active
            if active is not None and not active.closed:
                pushes.append((index, active.growing, active.pending, choice.finished))
                names.append(active.name)
                active.pending, active.deltas, active.closed = "", 0, choice.finished
        # Nothing may be sent of any before the verdicts of all are on record; `push` sees to that.
        for (index, *_), name, released in zip(pushes, names, await self._proxied.push(pushes), strict=True):
            if released.text:
                await self._tell(index, name, released.text)
            if released.blocked and not self._choices[index].told:
                await self._refuse(index)
        for index, choice in due:
            if choice.finished and not choice.told:
                await self._finish(index, choice)

    def _due(self, choice: _Choice, now: float) -> bool:
        text = choice.active
        return (
            choice.finished
            or bool(choice.ready)
            or (choice.since is not None and now - choice.since >= _LONGEST_WAIT)
            or (
                text is not None
                and (text.deltas >= self._hold_back or len(text.pending) >= self._hold_back * _TOKEN_CHARACTERS)
            )
        )

    async def _finish(self, index: int, choice: _Choice) -> None:
        """Judge what was kept to the end, send it, and then the choice's end."""
        finding = self._proxied.choice(index)
        late = [text for text in choice.texts.values() if text.late]
        whole = ["".join([*text.growing.said, text.late]) for text in late]
        whole += [text for text in [joined(choice.calls)] if text.strip()]
        if whole:
            await self._proxied.judge([(finding, text) for text in whole], ["response"] * len(whole), choice=index)
        if finding.blocked:
            await self._refuse(index)
            return
        for text in late:
            await self._tell(index, text.name, text.late)
        if choice.calls:
            await self._send_part(index, {"index": index, "delta": choice.calls, "finish_reason": None})
        await self._send_end(index, choice.finish)

    async def _refuse(self, index: int) -> None:
        """End a choice that is blocked: the refusal follows what was sent before."""
        self._choices[index].told = True
        if self._enough():
            await self._stop()
        await self._send_part(index, self._wire.delta(index, self._proxied.engine.policy.refusal))
        await self._send_end(index, "content_filter")

    async def _send_end(self, index: int, reason: str | None) -> None:
        choice, proxied = self._choices[index], self._proxied
        choice.told, choice.since = True, None
        choice.texts.clear()
        proxied.count("response", proxied.choice(index))
        part: dict[str, Any] = {**self._wire.ending(index, ""), "finish_reason": reason}
        more = {"usage": choice.usage} if choice.usage else {}
        await self._send_part(index, part, **more, sailguard=proxied.block([index]))

    async def _end(self) -> None:
        """The upstream is done: choices that it has given no end end here."""
        if not self._choices:
            raise broken("its answer holds nothing")
        for choice in self._choices.values():
            choice.finished = True
        await self._judge(0.0)

    async def _tell(self, index: int, name: str, text: str) -> None:
        part = self._wire.delta(index, text)
        if "delta" in part:
            part["delta"] = {name: text}
        await self._send_part(index, part)

    async def _send_part(self, index: int, part: dict[str, Any], **more: Any) -> None:
        await self._send({**self._head(self._choices[index].head), "choices": [part], **more})

    def _head(self, head: dict[str, Any]) -> dict[str, Any]:
        return {**self._wire.chunk([]), **head}

    async def _send(self, event: dict[str, Any] | str) -> None:
        self._sent = asyncio.get_running_loop().time()
        await self._send_event(event)


def _merged(known: Any, more: Any) -> Any:
    """What the deltas of a call have said so far and one more of them, as one delta."""
    if isinstance(more, dict):
        merged = dict(known) if isinstance(known, dict) else {}
        for name, value in more.items():
            whole = name in _WHOLE and isinstance(value, str)
            merged[name] = (value or merged.get(name)) if whole else _merged(merged.get(name), value)
        return merged
    if isinstance(more, list):
        parts = list(known) if isinstance(known, list) else []
        for part in more:
            number = part.get("index") if isinstance(part, dict) else None
            same = next(
                (i for i, old in enumerate(parts) if isinstance(old, dict) and old.get("index") == number), None
            )
            if number is None or same is None:
                parts.append(part)
            else:
                parts[same] = _merged(parts[same], part)
        return parts
    if isinstance(more, str) and isinstance(known, str):
        return known + more
    return known if more is None else more


def _passed_on(error: Any) -> ApiError:
    """The error that the upstream sent in mid-stream."""
    fields = error if isinstance(error, dict) else {"message": error}
    message = str(fields.get("message") or "The upstream server failed.")[:1000]
    return ApiError(502, message, kind=str(fields.get("type") or "upstream_error")[:100], code="upstream_error")
