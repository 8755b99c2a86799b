"""How Ray Serve itself is set up, by environment variables that its processes read when they start.

On one machine `apply()` before `ray.init` sets them; cluster.yaml and the Kubernetes manifests carry them for all other
clusters. Measured with benchmarks/bench_router.py on two busy cores: without them 32 streams reach 1,700 tokens/s, with
them 7,000 to 8,000.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType

SERVE_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # gRPC between replicas, and one event loop per replica instead of three. Engines step on their own thread.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Comes with the former, and would open a port of its own on every router replica.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    }
)


def apply() -> None:
    """Sets what is not set yet, for the processes of the cluster that `ray.init` or `ray start` then begins.

    A driver that imported ray.serve before this keeps handles that work outside of an event loop.
    """
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
