"""The router as a Ray Serve deployment: the ingress of the application."""

import asyncio
import urllib.request

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from .api import Api
from .directory import Directory
from .metrics import Metrics, ServeInstrument
from .prefix_lookup import PrefixLookup
from .replica_logging import log_to_stderr
from .router import RouterCore, Tokenizer
from .serve_pool import ServePool
from .settings import Settings, cluster_secret

METRICS_TIMEOUT_S = 5.0


@serve.ingress()
class Router:
    """Holds the core and its tokenizer; no model, no pages.

    decode: handle of the decode deployment. tokenizer: None loads the model's.
    """

    def __init__(
        self, settings: Settings, decode: "DeploymentHandle[object]", tokenizer: Tokenizer | None = None
    ) -> None:
        log_to_stderr()
        if tokenizer is None:
            tokenizer = _load_tokenizer(settings)
        pool = ServePool(decode)
        self._core = RouterCore(settings, tokenizer, pool, Metrics(ServeInstrument), _prefix_lookup(settings, pool))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Api(self._core, read_node_metrics).app()


def _prefix_lookup(settings: Settings, pool: ServePool) -> PrefixLookup | None:
    if settings.redis.url is None or not settings.cache.prefix_cache:
        return None
    key = cluster_secret(settings)
    return PrefixLookup(Directory.from_settings(settings, key), key, pool)


def _load_tokenizer(settings: Settings) -> Tokenizer:
    from lserve.engine.tokenizer import Tokenizer as ModelTokenizer

    return ModelTokenizer.from_pretrained(settings.model.path)


async def read_node_metrics() -> str:
    """What this node's Ray agent exports for Prometheus; our own names without the `ray_` that Ray puts before them."""
    node_id = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    node = next(node for node in nodes if node["NodeID"] == node_id)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=METRICS_TIMEOUT_S) as response:
            text: str = response.read().decode()
            return text

    return (await asyncio.to_thread(read)).replace("ray_lserve_", "lserve_")
