"""Sends a call to the replica that the caller names. Serve's own routers know queue lengths, not pages or prefixes."""

import contextvars
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from ray import serve
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .messages import LeaseCall, PrefillRequest, PrefixHint

P = ParamSpec("P")
T = TypeVar("T")


def call_apart(remote: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a handle's `remote` outside of the request that is being answered.

    Serve gives all calls that are made within a request one id, by which AddressedRouter's base class finds who gets a
    replica: of two that wait at once, one would wait for ever.
    """
    return contextvars.Context().run(remote, *args, **kwargs)


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
