"""Taking a node out of service: Serve moves its replicas elsewhere, and requests in progress end where they are."""

import time
from typing import Any, cast

import ray
from ray.core.generated import autoscaler_pb2
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from lserve.engine.errors import LServeError

_POLL_S = 0.5
_SERVING = ("ServeReplica:", "ProxyActor")
_MAX_ACTORS = 1000


def drain_node(node_id: str, timeout_s: float) -> bool:
    """Ask for the node to be drained, and wait until nothing on it serves any more; False if that took too long.

    Serve starts each replica on another node (an autoscaler may have to add one), then stops the old one, which
    finishes its requests and leases first. Replicas that have found no new home are stopped when time runs out. Needs a
    connected Ray driver and Ray's dashboard. LServeError when Ray refuses or its head is gone.
    """
    deadline = time.time() + timeout_s
    raylet, reasons = cast(Any, ray._raylet), cast(Any, autoscaler_pb2)  # neither is typed
    gcs = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    why = reasons.DRAIN_NODE_REASON_PREEMPTION  # the kind that is not refused while the node is busy
    accepted, refusal = gcs.drain_node(node_id, why, "lserve drain", int(deadline * 1000))
    if not accepted:
        raise LServeError(f"Ray does not drain node {node_id}: {refusal}")
    while serving_actors(node_id):
        if time.time() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def serving_actors(node_id: str) -> list[str]:
    """Class names of the Serve replicas and proxies that are alive on a node. LServeError when the head is gone."""
    address = ray.get_runtime_context().gcs_address
    on_node: list[Any] = [("node_id", "=", node_id), ("state", "=", "ALIVE")]
    try:
        alive = list_actors(address, filters=on_node, limit=_MAX_ACTORS)
    except (RayStateApiException, OSError) as error:
        raise LServeError(f"Ray's head does not answer: {error}".splitlines()[0]) from None
    return [actor.class_name for actor in alive if actor.class_name.startswith(_SERVING)]
