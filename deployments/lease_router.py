"""Serve forgets a replica that shuts down at once; the leases that it granted must still be released there."""

from typing import Any

from ray.serve.request_router import PendingRequest, RunningReplica

from .messages import LeaseCall
from .routing import AddressedRouter

MAX_LEAVING = 16


class LeaseRouter(AddressedRouter):
    """AddressedRouter for prefill workers: a LeaseCall also reaches a worker that is draining; nothing else does."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve once."""
        self._leaving: dict[object, RunningReplica] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Keeps in mind who leaves, the last ones."""
        running = {replica.replica_id for replica in replicas}
        left = {known: replica for known, replica in self.curr_replicas.items() if known not in running}
        kept = {known: replica for known, replica in (self._leaving | left).items() if known not in running}
        self._leaving = dict(list(kept.items())[-MAX_LEAVING:])
        super().update_replicas([*replicas, *self._leaving.values()])

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Forgets it."""
        self._leaving.pop(replica_id, None)
        super().on_replica_actor_died(replica_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, most preferred first."""
        is_lease_call = pending_request is not None and any(isinstance(a, LeaseCall) for a in pending_request.args)
        if not is_lease_call:
            candidate_replicas = [r for r in candidate_replicas if r.replica_id not in self._leaving]
        return await super().choose_replicas(candidate_replicas, pending_request)
