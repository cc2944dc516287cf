"""The sidecar on a Ray cluster: a Ray Serve application whose replicas are the servers of `sailguard serve`.

Nothing here is imported, and no Ray is needed, unless a cluster is asked for. `serve run service.cluster:build` and a
Serve config file name `build`; `sailguard serve --cluster` calls `serve_on_cluster`.
"""

from service.cluster.application import build
from service.cluster.command import serve_on_cluster

__all__ = ["build", "serve_on_cluster"]
