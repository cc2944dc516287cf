"""The heavy stages on a Ray cluster: the same files and bytes as on one machine, with the work on many.

Nothing here is imported, and no Ray is needed, unless a cluster is asked for.
"""

from training.cluster.explaining import run_on_cluster
from training.cluster.harvesting import harvest_on_cluster
from training.cluster.spreading import spread_on_cluster
from training.cluster.stages import cluster_stages
from training.cluster.training import train_saes_on_cluster

__all__ = [
    "cluster_stages",
    "harvest_on_cluster",
    "run_on_cluster",
    "spread_on_cluster",
    "train_saes_on_cluster",
]
