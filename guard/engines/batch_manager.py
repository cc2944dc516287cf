"""transformers' continuous batching as far as the guard leans on it. All that it relies on stands in this file.

Written for transformers 5.19. Public: `init_continuous_batching`, on which `generate_batch` and
`continuous_batching_context_manager` are built, `ContinuousBatchingConfig`, the manager's `add_request`,
`cancel_request`, `stop`, `pause`, `is_running` and `destroy`, and `GenerationOutput`. What is not documented, but has
public names: `manager.output_router`, through whose `deliver` and `deliver_batch` every output leaves, and
`manager.batch_processor`, with the requests of the pass in work. Two names are private: see `cached_manager` and
`end_next`. Each pass is compared with what the model is given, so that another layout is an error, not a token unseen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch

from guard.engines.generate_options import bind_options, effective
from guard.errors import UnsupportedGenerationError

_ADVICE = "leave it at its default, or detach the guard"


class Share(NamedTuple):
    """One request's tokens in a packed forward pass."""

    request_id: str
    start: int
    """The row of its first token."""
    position: int
    """The place of its first token in its sequence."""
    ids: list[int]
    logits_row: int | None
    """The row of the logits that its next token is chosen from; None while its prompt is not read to the end."""
    record: Any
    """The manager's own record of it."""


class Requests(Protocol):
    """Who is told of what enters and leaves a manager."""

    def added(self, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments with which a request is to be added, given those it was added with."""

    def denied(self, request_id: str) -> None:
        """The manager did not take it."""

    def cancelled(self, request_id: str) -> None:
        """It will not be heard of again."""

    def leaving(self, output: Any) -> bool:
        """Cut an output to what may leave. Returns whether it is to leave at all."""


class Tap:
    """A manager whose entry and exit are watched, until `restore()`."""

    def __init__(self, manager: Any, requests: Requests) -> None:
        self.manager = manager
        self._requests = requests
        router = manager.output_router
        self._add, self._cancel = manager.add_request, manager.cancel_request
        self._deliver, self._deliver_batch = router.deliver, router.deliver_batch
        manager.add_request, manager.cancel_request = self._add_request, self._cancel_request
        router.deliver, router.deliver_batch = self._deliver_one, self._deliver_many

    def restore(self) -> None:
        """Give the manager its own methods back; calling twice is harmless."""
        for owner, names in (
            (self.manager, ("add_request", "cancel_request")),
            (self.manager.output_router, ("deliver", "deliver_batch")),
        ):
            for name in names:
                vars(owner).pop(name, None)

    @property
    def running(self) -> bool:
        """Whether the manager's thread is at work."""
        return bool(self.manager.is_running())

    def owns(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a packed forward pass is one of this manager's: it reads and writes the manager's cache."""
        processor = self.manager.batch_processor
        return processor is not None and processor.cache is kwargs.get("cache")

    def _add_request(self, *args: Any, **kwargs: Any) -> Any:
        options = bind_options(self._add, args, kwargs)
        defaults = self.manager.generation_config
        for name in ("max_new_tokens", "eos_token_id"):
            if options.get(name) is None:
                options[name] = getattr(defaults, name)
        options = self._requests.added(options)
        found = None
        try:
            found = self._add(**options)
        finally:
            if found is None:
                self._requests.denied(options["request_id"])
        return found

    def _cancel_request(self, request_id: str) -> None:
        self._cancel(request_id)
        self._requests.cancelled(request_id)

    def _deliver_one(self, output: Any) -> None:
        if self._requests.leaving(output):
            self._deliver(output)

    def _deliver_many(self, outputs: list[Any]) -> None:
        self._deliver_batch([output for output in outputs if self._requests.leaving(output)])


def open_manager(model: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The manager that `init_continuous_batching(*args, **kwargs)` gives, with nothing that the guard cannot follow.

    Sharing of cached prompts between requests is switched off, and so are CUDA graphs and asynchronous batching where
    they are left to be chosen. Raises UnsupportedGenerationError naming what was asked for and cannot be followed.
    """
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    _require(ContinuousBatchingManager, "add_request", "cancel_request", "pause")
    options = bind_options(original, args, kwargs)
    generation = options.get("generation_config") or model.generation_config
    for name, accepted in (("num_return_sequences", (None, 1)), ("guidance_scale", (None, 1))):
        value = effective(model, {"generation_config": generation}, name)
        if value not in accepted:
            _refuse(name, value, "an answer would begin from a prompt that was not computed for it")
    if getattr(model, "tp_size", None) not in (None, 1):
        _refuse("tp_size", model.tp_size, "the guard has not been verified with tensor parallelism")
    given = options.get("continuous_batching_config") or getattr(generation, "continuous_batching_config", None)
    config = ContinuousBatchingConfig() if given is None else copy.deepcopy(given)
    _require(config, "allow_block_sharing", "use_cuda_graph", "use_async_batching", "cpu_offload_space")
    config.allow_block_sharing = False  # on by default; a prompt that another request has cached would not be computed
    config.use_cuda_graph = False if config.use_cuda_graph is None else config.use_cuda_graph
    config.use_async_batching = False if config.use_async_batching is None else config.use_async_batching
    _check(config)
    manager = original(**{**options, "continuous_batching_config": config})
    _require(manager, "output_router", "batch_processor", "generation_config")
    _check(manager.continuous_batching_config)  # as it was resolved
    return manager


def _require(of: Any, *names: str) -> None:
    missing = [name for name in names if not hasattr(of, name)]
    if missing:
        import transformers

        kind = of if isinstance(of, type) else type(of)
        raise UnsupportedGenerationError(
            f"{kind.__name__} of transformers {transformers.__version__} has no {', '.join(missing)}; the guard "
            "follows continuous batching as it is in transformers 5.19: install that, or detach the guard"
        )


def _check(config: Any) -> None:
    if any(config.cuda_graph_booleans):
        _refuse("use_cuda_graph", config.use_cuda_graph, "a graph that is replayed runs no hook")
    for name in ("varlen_compile_config", "decode_compile_config", "default_compile_level"):
        if getattr(config, name):
            _refuse(name, getattr(config, name), "hooks have not been verified in a compiled forward pass")
    if config.use_async_batching:
        _refuse("use_async_batching", True, "a token would be chosen before the one before it was judged")
    if config.cpu_offload_space != 0:
        _refuse("cpu_offload_space", config.cpu_offload_space, "the guard has not been verified with it")
    if config.allow_block_sharing:
        _refuse("allow_block_sharing", True, "a prompt that another request has cached would not be computed")


def _refuse(name: str, value: object, reason: str) -> None:
    raise UnsupportedGenerationError(
        f"continuous batching with {name}={value!r} is not supported under the guard: {reason}; {_ADVICE}"
    )


def cached_manager(model: Any) -> Any:
    """The manager that an earlier `generate_batch(..., persistent_manager=True)` has left on the model, or None.

    Private: there is a public way to destroy it, `destroy_cached_continuous_batching_manager`, but none to see it.
    """
    return getattr(model, "_cached_continuous_batching_manager", None)


def read_shares(manager: Any, kwargs: Mapping[str, Any]) -> list[Share]:
    """Which request each row of a packed forward pass belongs to, by the manager's own record of the pass.

    Raises UnsupportedGenerationError if that record and what the model is given do not agree.
    """
    scheduled = manager.batch_processor.inputs_and_outputs.requests_in_batch
    edges = [0, *accumulate(future.query_length for future in scheduled)]
    input_ids, position_ids = kwargs["input_ids"], kwargs["position_ids"]
    agree = kwargs["cu_seq_lens_q"].tolist() == edges and input_ids.shape == position_ids.shape == (1, edges[-1])
    if not agree:
        raise UnsupportedGenerationError(
            f"a packed forward pass of {tuple(input_ids.shape)} tokens is not that of the {len(scheduled)} requests "
            "that the manager has scheduled; the guard follows transformers 5.19"
        )
    ids, positions = torch.stack([input_ids[0], position_ids[0]]).tolist()
    chosen = kwargs["logits_indices"].tolist()
    gathered = kwargs.get("logits_to_keep") is not None
    shares: list[Share] = []
    choosing = 0
    for future, (start, stop) in zip(scheduled, pairwise(edges), strict=True):
        row = None
        if future.has_new_token:
            row, choosing = choosing, choosing + 1
            agree = agree and chosen[row] == stop - 1
            row = row if gathered else stop - 1
        first = positions[start] if start < stop else 0
        agree = agree and stop > start and positions[start:stop] == list(range(first, first + stop - start))
        shares.append(Share(future.state.request_id, start, first, ids[start:stop], row, future.state))
    if not agree:
        raise UnsupportedGenerationError(
            "a packed forward pass does not hold each request's tokens one after another; the guard follows "
            "transformers 5.19"
        )
    return shares


def end_next(record: Any) -> None:
    """Have a request end with the token that is chosen next, whatever a logits processor makes of it.

    Private: `_new_tokens_limit`, which the manager compares with the number of tokens generated after each of them.
    """
    record._new_tokens_limit = record.generated_len() + 1


def cut(output: Any, tokens: int) -> None:
    """Leave an output its first `tokens` generated tokens."""
    output.generated_tokens = output.generated_tokens[:tokens]
    output.logprobs = output.logprobs[:tokens]
    if output.timestamps is not None:
        output.timestamps = output.timestamps[:tokens]
