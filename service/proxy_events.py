"""Server-sent events out of bytes, however these are cut: an upstream's lines are of bounded length."""

from __future__ import annotations

__all__ = ["EventReader", "LineTooLongError"]

_BOM = b"\xef\xbb\xbf"


class LineTooLongError(ValueError):
    """An event is longer than any sensible one."""


class EventReader:
    """Turns the bytes of a `text/event-stream` into the data of its events.

    Only `data` counts: the field's lines are joined by a newline, comments and other fields are skipped. Lines end
    with CRLF, LF or CR, as the standard has it. Raises `LineTooLongError` for an event of more than `limit` bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._searched = 0
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._first = True

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that `piece` completes."""
        if self._after_cr and piece:
            # The second half of a CRLF that was cut in two; alone it would be an empty line, which ends an event.
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        self._rest += piece
        events = []
        while (end := self._line_end()) >= 0:
            line = bytes(self._rest[:end])
            width = 2 if self._rest[end : end + 2] == b"\r\n" else 1
            self._after_cr = self._rest[end] == 0x0D and end + 1 == len(self._rest)
            del self._rest[: end + width]
            self._searched = 0
            event = self._line(line)
            if event is not None:
                events.append(event)
        if len(self._rest) + self._size > self._limit:
            raise LineTooLongError(f"an event is longer than {self._limit} bytes")
        return events

    def end(self) -> str | None:
        """The data of an event that the end of the stream completes: some servers leave the last empty line out."""
        line = bytes(self._rest)
        self._rest.clear()
        if line:
            self._line(line)
        return self._line(b"")

    def _line_end(self) -> int:
        """Where the next line ends, or -1. What was searched before is not searched again."""
        start = self._searched
        newline = self._rest.find(b"\n", start)
        end = self._rest.find(b"\r", start, newline if newline >= 0 else len(self._rest))
        end = newline if end < 0 else end
        self._searched = len(self._rest) if end < 0 else 0
        return end

    def _line(self, line: bytes) -> str | None:
        """Take one line; an empty one gives the data of the event that it ends."""
        if self._first:
            self._first = False
            line = line.removeprefix(_BOM)
        if not line:
            data, self._data, self._size = self._data, [], 0
            return b"\n".join(data).decode("utf-8", "replace") or None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value) + 1
            if self._size > self._limit:
                raise LineTooLongError(f"an event is longer than {self._limit} bytes")
        return None
