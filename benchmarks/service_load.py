"""Clients of the service benchmark: a closed loop of them, in a process of its own, over plain sockets.

    python -m benchmarks.service_load URL --clients 64 --seconds 120 --tokens 20,100,400

With `--path /healthz` they get that page instead. Prints one JSON line: how many requests ended how, and how long each
of the answered ones took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

MODERATIONS = "/v1/moderations"
PASSAGE = (
    "The harbour of the old town opens to the north and its warehouses now hold a museum a library and two schools "
    "where in winter the fishermen mend their nets while the children read about rivers glaciers and distant coasts"
)


def text(tokens: int, number: int) -> str:
    """Harmless text of about so many tokens, another one for each number."""
    words = PASSAGE.split()
    return " ".join(words[(number * 7 + i) % len(words)] for i in range(max(1, round(tokens / 1.15))))


class Client:
    """One connection that is kept, and opened again when the server closes it."""

    def __init__(self, url: str, path: str) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port or 80
        method = "POST" if path == MODERATIONS else "GET"
        self._head = f"{method} {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, body: bytes) -> int:
        """The status of one request; 0 for a connection that broke."""
        try:
            if self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
            assert self._reader is not None
            self._writer.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            head = await self._reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            (length,) = (int(line[15:]) for line in lines if line.startswith(b"content-length:"))
            await self._reader.readexactly(length)
            if b"connection: close" in lines:
                self.close()
            return int(head[9:12])
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def run(url: str, clients: int, seconds: float, tokens: Sequence[int], path: str = MODERATIONS) -> dict[str, Any]:
    """The closed loop: each client asks again as soon as it has its answer."""
    bodies = [json.dumps({"input": text(n, i)}).encode() for i in range(8) for n in tokens]
    if path != MODERATIONS:
        bodies = [b""]
    statuses: Counter[int] = Counter()
    times: list[float] = []
    ends = time.perf_counter() + seconds

    async def loop(number: int) -> None:
        client, turn = Client(url, path), number
        while (began := time.perf_counter()) < ends:
            status = await client.ask(bodies[turn % len(bodies)])
            statuses[status] += 1
            turn += 1
            if status == 200:
                times.append(time.perf_counter() - began)
            else:
                await asyncio.sleep(0.05)
        client.close()

    await asyncio.gather(*(loop(number) for number in range(clients)))
    return {"statuses": {str(k): v for k, v in sorted(statuses.items())}, "seconds": seconds, "times": sorted(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", default="100")
    parser.add_argument("--path", default=MODERATIONS)
    args = parser.parse_args()
    found = asyncio.run(run(args.url, args.clients, args.seconds, [int(n) for n in args.tokens.split(",")], args.path))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
