"""Harvesting and training on a Ray cluster: the same stages, files and bytes, with the work on many machines.

Nothing here is imported, and no Ray is needed, unless a cluster is asked for.
"""

from training.cluster.connection import connect
from training.cluster.harvesting import harvest_on_cluster
from training.cluster.stages import cluster_stages
from training.cluster.training import train_saes_on_cluster

__all__ = ["cluster_stages", "connect", "harvest_on_cluster", "train_saes_on_cluster"]
