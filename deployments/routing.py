"""Sends a call to the replica that the caller names. Serve's own routers know queue lengths, not pages or prefixes."""

from collections.abc import Sequence

from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .messages import LeaseCall, PrefillRequest, PrefixHint


def own_worker_id() -> str:
    """The id under which other workers name this replica; call it inside a replica."""
    unique_id: str = serve.get_replica_context().replica_id.unique_id
    return unique_id


class AddressedRouter(RequestRouter):
    """Tries the workers in `prefer` of a PrefixHint, PrefillRequest or LeaseCall in order, then every other one.

    Use: `RequestRouterConfig(request_router_class="lserve.deployments.routing:AddressedRouter")` on the called
    deployment. A named worker that died or is full is passed over; the rest stand in one rank, where Serve takes the
    shortest queue. No FIFOMixin: with it the oldest call would get the replica that was chosen for another one.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, most preferred first."""
        preferred: tuple[str, ...] = ()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            preferred = _preference(pending_request.args)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        named = [by_id.pop(worker_id) for worker_id in dict.fromkeys(preferred) if worker_id in by_id]
        ranks = [[replica] for replica in named]
        return [*ranks, list(by_id.values())] if by_id else ranks


def _preference(arguments: Sequence[object]) -> tuple[str, ...]:
    for argument in arguments:
        if isinstance(argument, PrefixHint | PrefillRequest | LeaseCall):
            return argument.prefer
    return ()
