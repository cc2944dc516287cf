"""Reading (and changing) activations at hook points: the one code path of harvest, scoring and the live guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feature_bank.batches import length_batches as length_batches  # of this path: harvest and scoring share it
from guard.hook_points import blocks_before, execution_order, resolve

Observer = Callable[[str, Float[Tensor, "batch seq d_in"]], Float[Tensor, "batch seq d_in"] | None]
"""Called with (hook_name, activation); a returned tensor replaces the activation, None leaves it untouched."""


class StopForwardError(Exception):
    """Raised by an observer to end a forward pass at its hook point: nothing after it is computed."""


class Capture:
    """Hooks on a model's hook points, each calling `observer`. Remove with `close()` or as a context manager."""

    def __init__(self, model: nn.Module, hook_names: Sequence[str], observer: Observer) -> None:
        self._observer = observer
        self._handles: list[RemovableHandle] = []
        targets = [(name, resolve(model, name)) for name in hook_names]  # all resolve before any hook is placed
        for name, target in targets:
            if target.takes_input:
                handle = target.module.register_forward_pre_hook(self._input_hook(name), with_kwargs=True)
            else:
                handle = target.module.register_forward_hook(self._output_hook(name))
            self._handles.append(handle)

    def _input_hook(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            replaced = self._observer(name, hidden)
            if replaced is None:
                return None
            return ((replaced, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": replaced})

        return hook

    def _output_hook(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            replaced = self._observer(name, hidden)
            if replaced is None:
                return None
            return replaced if isinstance(output, Tensor) else (replaced, *output[1:])

        return hook

    def close(self) -> None:
        """Remove the hooks; calling twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@torch.inference_mode()
def truncated_forward(
    model: nn.Module,
    hook_names: Sequence[str],
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    **kwargs: Any,
) -> dict[str, Float[Tensor, "batch seq d_in"]]:
    """Run the model up to the last of the hook points and return the activation at each.

    The tensors are the model's own (its dtype and device), rows of padding included.
    """
    found: dict[str, Tensor] = {}
    last = max(hook_names, key=execution_order)

    def observer(name: str, hidden: Tensor) -> None:
        found[name] = hidden
        if name == last:
            raise StopForwardError

    kwargs.setdefault("use_cache", False)
    with Capture(model, hook_names, observer), suppress(StopForwardError):
        model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    return found


@contextmanager
def skipped_before(model: nn.Module, hook_name: str) -> Iterator[None]:
    """Within this context the blocks that end at or before a hook point hand on what they are given.

    An observer there that puts an activation of an earlier pass in place resumes that pass from the hook point on.
    """

    def hand_on(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden

    skipped = [(block, vars(block).get("forward")) for block in blocks_before(model, hook_name)]
    try:
        for block, _ in skipped:
            block.forward = hand_on
        yield
    finally:
        for block, own in skipped:
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Right-padded ids and attention mask of sequences of unequal length."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)
