"""Replicas in several processes, which meet through torch.distributed: gloo between CPUs, NCCL between accelerators.

Every result is the same in all of them to the bit, so that they decide alike what to do next: a sum is made in one
place and handed on, a selection is made from the same values in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from feature_bank.errors import DataError, SailguardError
from training.batches import Batch
from training.replicas import ALONE, Replicas

T = TypeVar("T")
CPU_BACKEND = "gloo"
CUDA_BACKEND = "cpu:gloo,cuda:nccl"  # decisions pass between CPUs, so that no accelerator waits for them


class GroupedReplicas(Replicas):
    """The members of a process group. All must make the same calls in the same order.

    group: a process group of torch.distributed, or one of its backends. batch: rows of a whole batch; each member takes
    consecutive ones of them, in the order of the ranks, and at most one row more than another.

    A member that is lost makes the calls of the others raise RuntimeError.
    """

    def __init__(self, group: Any, batch: int) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self._group = group
        self._batch = batch
        self._own = slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def parts(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """See `Replicas.parts`."""
        return ({name: rows[self._own] for name, rows in batch.items()} for batch in batches)

    def rows(self, own: int) -> int:  # noqa: ARG002  # what all have together does not depend on it
        """See `Replicas.rows`."""
        return self._batch

    # torch.compile cannot look into a process group
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def sums(self, *own: Tensor) -> tuple[Tensor, ...]:
        """See `Replicas.sums`. All in one message, in float64, in which counts are exact."""
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in own])
        self._group.allreduce([flat]).wait()
        found = torch.split(flat, [tensor.numel() for tensor in own])
        return tuple(part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(found, own, strict=True))

    def add_up(self, own: Iterable[Tensor]) -> None:
        """See `Replicas.add_up`."""
        for work in [self._group.allreduce([tensor]) for tensor in own]:
            work.wait()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def least(self, own: float) -> float:
        """See `Replicas.least`."""
        found = torch.tensor([own], dtype=torch.float64)
        self._group.allreduce([found], dist.ReduceOp.MIN).wait()
        return float(found)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gather(self, own: Float[Tensor, " own"]) -> Float[Tensor, " all"]:
        """See `Replicas.gather`."""
        counts = torch.zeros(self.size, dtype=torch.long)
        counts[self.rank] = own.numel()
        self._group.allreduce([counts]).wait()
        most = max(1, int(counts.max()))
        padded = own.new_zeros(most)
        padded[: own.numel()] = own
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._group.allgather([found], [padded]).wait()
        return torch.cat([part[:count] for part, count in zip(found, counts.tolist(), strict=True)])

    def copy_first(self, own: Iterable[Tensor]) -> bool:
        """See `Replicas.copy_first`."""
        differed = torch.zeros(1)
        for tensor in own:
            first = tensor.clone()
            self._group.broadcast([first], self._options(0)).wait()
            if not torch.equal(first, tensor):
                differed.fill_(1)
                tensor.copy_(first)
        self._group.allreduce([differed]).wait()
        return bool(differed)

    def lead(self, make: Callable[[], T]) -> T:
        """See `Replicas.lead`."""
        outcome: list[Any] = [None, None]
        error: SailguardError | None = None
        if self.rank == 0:
            try:
                outcome[0] = make()
            except SailguardError as e:
                error = e
                outcome[1] = str(e)
        found, said = self._told(outcome, 0)
        if said is not None:
            raise error or DataError(said)
        return found  # type: ignore[no-any-return]

    def each(self, make: Callable[[], T]) -> T:
        """See `Replicas.each`."""
        error: SailguardError | None = None
        failed = torch.zeros(self.size)
        try:
            found = make()
        except SailguardError as e:
            error = e
            failed[self.rank] = 1
        self._group.allreduce([failed]).wait()
        if bool(failed.any()):
            said = self._told(str(error), int(failed.argmax()))
            raise error or DataError(said)
        return found

    def _told(self, content: Any, source: int) -> Any:
        """What `content` is in the member `source`."""
        text = bytearray(json.dumps(content).encode())
        length = torch.tensor([len(text)])
        self._group.broadcast([length], self._options(source)).wait()
        sent = torch.frombuffer(text, dtype=torch.uint8)
        received = sent if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
        self._group.broadcast([received], self._options(source)).wait()
        return json.loads(received.numpy().tobytes())

    def _options(self, source: int) -> dist.BroadcastOptions:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        return options


def form_groups(members: Sequence[Sequence[int]], device: torch.device, batch: int) -> Replicas:
    """The group that this process belongs to, out of the ranks of each; a process of none, or of its own, is alone.

    Every process of the world must call this, with the same groups.
    """
    found = ALONE
    for ranks in members:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), backend=CUDA_BACKEND if device.type == "cuda" else CPU_BACKEND)
            if dist.get_rank() in ranks:
                found = GroupedReplicas(group, batch)
    return found


def whole_world() -> Replicas:
    """All processes, to agree on something, not to train."""
    return GroupedReplicas(dist.group.WORLD, 0) if dist.is_initialized() and dist.get_world_size() > 1 else ALONE
