"""The application graph: router before decode workers before prefill workers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from .settings import Settings, WorkerResources, load_settings

if TYPE_CHECKING:
    from .router import Tokenizer

UNLIMITED = 100_000
"""Serve's own limits stay out of the way: the router admits, and engines say when they are full."""

ADDRESSED = RequestRouterConfig(request_router_class="lserve.deployments.routing:AddressedRouter")


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application from an `args:` block. Raises SettingsError."""
    from .decode_worker import decode_deployment
    from .prefill_worker import prefill_deployment

    settings = load_settings(args)
    prefill = None
    if settings.prefill.replicas:
        prefill = worker(prefill_deployment, settings.prefill, settings.prefill.replicas).bind(settings)
    decode = worker(decode_deployment, settings.decode, settings.decode.replicas).bind(settings, prefill)
    return bind_router(settings, decode)


def bind_router(
    settings: Settings, decode: serve.Application, tokenizer: "Tokenizer | None" = None
) -> serve.Application:
    """The router before any deployment that speaks like a decode worker. tokenizer: None loads the model's."""
    from .router_deployment import Router

    router = Router.options(
        num_replicas=settings.router.replicas,
        ray_actor_options=resources(settings.router),
        max_ongoing_requests=UNLIMITED,
    )
    return router.bind(settings, decode, tokenizer)


def worker(deployment: serve.Deployment, role: WorkerResources, replicas: int) -> serve.Deployment:
    """A worker deployment as its role's settings want it, called by the names in `prefer`."""
    return deployment.options(
        num_replicas=replicas,
        ray_actor_options=resources(role),
        max_ongoing_requests=UNLIMITED,
        request_router_config=ADDRESSED,
    )


def resources(role: WorkerResources) -> dict[str, Any]:
    """What Ray reserves for a replica."""
    return {"num_cpus": role.num_cpus, "num_gpus": role.num_gpus, "resources": dict(role.resources)}
