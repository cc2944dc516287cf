"""Mixed into a guarded worker by tests: it shows what the guard saw and did there, and makes it fail on request."""

from __future__ import annotations

from typing import Any

from guard.engines.vllm.required import Guarded


class Probe(Guarded):
    """Methods that a test calls through `collective_rpc`."""

    def probe_record(self) -> None:
        """Keep, from now on, the activations of every token by request and position, and where rows are steered."""
        worker: Any = self
        watch = worker._watch
        worker._programs.log = []
        self._probe_acts: dict[tuple[str, int], list[float]] = {}
        self._probe_passes: list[list[tuple[str, int, int]]] = []
        if watch is None:
            return
        observe = watch.observe

        def observed(batch: Any, seen: Any, slots: Any = None) -> None:
            acts = type(watch._encoder).encode(watch._encoder, seen)  # not what `probe_break` has put in its place
            shares = []
            for i, request_id in enumerate(batch.request_ids):
                first, start, stop = int(batch.first[i]), int(batch.edges[i]), int(batch.edges[i + 1])
                shares.append((request_id, first, stop - start))
                for row in range(start, stop):
                    self._probe_acts[request_id, first + row - start] = acts[row].tolist()
            self._probe_passes.append(shares)
            observe(batch, seen, slots)

        watch.observe = observed

    def probe_acts(self) -> list[Any]:
        """(request, position, feature activations) of all tokens since `probe_record`."""
        return [(request_id, position, acts) for (request_id, position), acts in self._probe_acts.items()]

    def probe_passes(self) -> list[Any]:
        """Of every pass since `probe_record`, the (request, first position, tokens) in it."""
        return self._probe_passes

    def probe_steered(self) -> list[Any]:
        """(request, position) of every row that was steered since `probe_record`."""
        worker: Any = self
        return list(worker._programs.log)

    def probe_break(self, broken: bool) -> None:
        """Have the guard fail on every pass, or no longer."""
        worker: Any = self
        encoder = worker._watch._encoder
        if broken:
            encoder.encode = _fail
        else:
            del encoder.encode

    def probe_cut(self, cut: bool) -> None:
        """Have it look as if no pass came through the taps any more, or as it is."""
        worker: Any = self
        passed = [int(tap.passes) for tap in worker._taps.values()]
        worker._passes = 2**40 if cut else min(passed)


def _fail(_: Any) -> Any:
    raise RuntimeError("broken by the test")
