"""Where the heavy stages of a training run: in this process, or on a Ray cluster (`--cluster`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from training.stages import Stages

__all__ = ["ClusterOption", "stages_on"]

ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="auto|ADDRESS",
        help="Work on a Ray cluster: the one this machine belongs to, or HOST:PORT of its head. Default: here.",
    ),
]


@contextmanager
def stages_on(cluster: str | None) -> Iterator[Stages]:
    """The stages of this process, or those of the cluster, joined for the time of the context.

    Raises DataError if Ray is not installed, or the cluster cannot be reached.
    """
    from training.stages import HERE

    if cluster is None:
        yield HERE
        return
    from feature_bank.ray_cluster import connect
    from training.cluster import cluster_stages

    with connect(cluster, "data", "train"):
        yield cluster_stages()
