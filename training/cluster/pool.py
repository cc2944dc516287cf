"""A pool of Ray actors that work off numbered rows; what a lost machine had in hand goes to others."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from feature_bank.errors import DataError
from feature_bank.ray_cluster import import_ray
from training.cluster.room import Room

TASKS_AHEAD = 2  # rows that an actor has at hand: one in work, one waiting
STILL_SECONDS = 6 * 3600.0  # without a finished row: longer than one takes, or than a busy cluster has no room for us


def work_off_tables(
    actor: type, arguments: Sequence[Any], tables: Sequence[Any], places: Room, *, workers: int, kept: str
) -> Generator[dict[str, Any]]:
    """What the actors make of the rows, in whatever order.

    actor: is made with `arguments` on each worker and called with a table of one row; it gives such a table, with the
    columns `number` and `error`, which is empty or what no other actor would avoid. An argument that is large is a
    reference to an object, in a list, where Ray leaves it one. kept: what is not lost if the cluster is.

    Raises DataError for the first error, and for a cluster that is lost.
    """
    ray = import_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = STILL_SECONDS
    dataset = ray.data.from_arrow(tables).map_batches(
        actor,
        fn_constructor_args=tuple(arguments),
        batch_size=1,
        batch_format="pyarrow",
        # From one: what a lost machine held in hand goes to others once they have nothing else to do
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=TASKS_AHEAD
        ),
        num_cpus=places.cpus,
        num_gpus=places.gpus,
    )
    del tables
    try:
        for found in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in found.to_pylist():
                if row["error"]:
                    raise DataError(row["error"])
                yield row
    except ray.data.exceptions.ExecutionTimeoutError as e:
        raise DataError(
            f"the cluster has finished nothing for {STILL_SECONDS / 3600:g} hours: it has no room, or workers end at "
            f"what they are given, perhaps for lack of memory; {kept}: run the same command again"
        ) from e
    except ray.exceptions.RayError as e:
        reason = " ".join(str(e).split())[-400:]
        raise DataError(f"the cluster could not go on ({reason}); {kept}: run the same command again") from e
