"""The heavy stages on the connected cluster."""

from __future__ import annotations

from training.cluster.explaining import run_on_cluster
from training.cluster.harvesting import harvest_on_cluster
from training.cluster.spreading import spread_on_cluster
from training.cluster.training import train_saes_on_cluster
from training.stages import Stages


def cluster_stages() -> Stages:
    """Stages that work on the cluster that `connect` has joined."""
    return Stages(
        harvest=harvest_on_cluster,
        train_saes=train_saes_on_cluster,
        spread=spread_on_cluster,
        explain=run_on_cluster,
    )
