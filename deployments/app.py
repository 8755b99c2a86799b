"""The application graph: router before decode workers before prefill workers."""

from collections.abc import Mapping
from typing import Any, cast

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from .router import Tokenizer
from .router_deployment import Router
from .settings import Settings, WorkerResources, load_settings

UNLIMITED = 100_000
"""Serve's own limits stay out of the way: the router admits, and engines say when they are full."""

ADDRESSED_ROUTER = "lserve.deployments.routing:AddressedRouter"
LEASE_ROUTER = "lserve.deployments.lease_router:LeaseRouter"
SCALE_DEPLOYMENT = "lserve.deployments.autoscaling:scale_deployment"

DRAIN_CHECK_S = 2.0
"""How often a replica that is shut down looks whether its calls have ended, and the least that it goes on taking calls.

Those who call it hear that it leaves with a delay: with 0.2 s, some streams met a closed door in a rolling redeploy.
"""


LEAVE_S = 5.0
"""What a worker has after `drain_s`, for pages that Redis lacks."""

LOOK_BACK_S = 15.0
"""Over which a worker's numbers are averaged for autoscaling; they cover half a minute themselves."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application from an `args:` block. Raises SettingsError."""
    from .decode_worker import DecodeDeployment
    from .prefill_worker import PrefillDeployment

    settings = load_settings(args)
    prefill = None
    if settings.prefill.replicas:
        prefill = worker(PrefillDeployment, settings.prefill, LEASE_ROUTER).options(name="PrefillWorker").bind(settings)
    decode = worker(DecodeDeployment, settings.decode).options(name="DecodeWorker").bind(settings, prefill)
    return bind_router(settings, decode)


def bind_router(settings: Settings, decode: serve.Application, tokenizer: Tokenizer | None = None) -> serve.Application:
    """The router before any deployment that speaks like a decode worker. tokenizer: None loads the model's."""
    return _deployment(Router, settings.router).bind(settings, decode, tokenizer)


def worker(kind: type, role: WorkerResources, router: Any = ADDRESSED_ROUTER) -> serve.Deployment:
    """A deployment of this class whose replicas can be called by name."""
    return _deployment(kind, role).options(request_router_config=RequestRouterConfig(request_router_class=router))


def _deployment(kind: type, role: WorkerResources) -> serve.Deployment:
    made = cast(serve.Deployment, serve.deployment(kind))
    return made.options(
        **_replicas(role),
        ray_actor_options={"num_cpus": role.num_cpus, "num_gpus": role.num_gpus, "resources": dict(role.resources)},
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=role.drain_s + LEAVE_S,
        graceful_shutdown_wait_loop_s=DRAIN_CHECK_S,
    )


def _replicas(role: WorkerResources) -> dict[str, Any]:
    """A fixed number, or the bounds between which the policy decides: at once, since it has its own delay."""
    if not role.is_autoscaled:
        return {"num_replicas": role.replicas}
    config = AutoscalingConfig(
        min_replicas=role.least_replicas,
        initial_replicas=role.replicas,
        max_replicas=role.most_replicas,
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=SCALE_DEPLOYMENT),  # type: ignore[no-untyped-call]
    )
    return {"autoscaling_config": config}
