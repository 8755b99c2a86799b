"""What a failed call to another replica means, in our own errors."""

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from lserve.engine.errors import CapacityError, LServeError, WorkerLostError

from .pool import WorkerGoneError

SERVE_ERRORS = (RayError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError)
"""Everything that a call through a Serve handle raises."""


def translated(error: Exception) -> LServeError:
    """The worker's own error, or the loss of the worker."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, LServeError):
            return cause
        if not isinstance(cause, RayActorError):
            return LServeError(f"a worker failed: {type(cause).__name__}")
    if isinstance(error, BackPressureError):
        return CapacityError("every worker's queue is full")
    if isinstance(error, DeploymentUnavailableError):
        return WorkerLostError("no worker is running")
    return WorkerGoneError("the worker was lost")
