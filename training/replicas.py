"""The processes that train one SAE together, each on a part of every batch. A process alone is all of them.

Whatever a step makes of a whole batch is a sum over its rows, a smallest value, or a selection from all of them. The
training loop and the architectures ask for these here, and so are the same for one process and for several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from training.batches import Batch

T = TypeVar("T")


class Replicas:
    """A process that trains alone: what it has is the whole already, and comes back as it is, to the bit."""

    rank = 0
    """The first one, 0, reads and writes what is kept."""
    size = 1

    def parts(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Of each batch the rows that are trained on here."""
        return batches

    def rows(self, own: int) -> int:
        """Rows of the whole batch, of which `own` are here."""
        return own

    def sums(self, *own: Tensor) -> tuple[Tensor, ...]:
        """The sum of each over all replicas; of booleans, whether it is true in any. For figures, not for gradients."""
        return own

    def add_up(self, own: Iterable[Tensor]) -> None:
        """Put the sum over all replicas in the place of each tensor, contiguous ones of any size."""

    def least(self, own: float) -> float:
        """The smallest of all."""
        return own

    def gather(self, own: Float[Tensor, " own"]) -> Float[Tensor, " all"]:
        """The values of all, in the same order everywhere; each may have another number of them."""
        return own

    def copy_first(self, own: Iterable[Tensor]) -> bool:
        """Put the first replica's values in the place of each tensor; whether they were others."""
        del own
        return False

    def lead(self, make: Callable[[], T]) -> T:
        """What `make`, called in the first replica alone, gives, or the SailguardError that it raises, in all.

        It must be what JSON can hold.
        """
        return make()

    def each(self, make: Callable[[], T]) -> T:
        """What `make` gives here, unless it raises SailguardError in any replica: then that is raised in all."""
        return make()


ALONE = Replicas()
