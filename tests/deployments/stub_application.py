"""The router before stub workers that write a letter every 20 ms, as an application of real Ray Serve."""

import os
from pathlib import Path
from typing import Any

from running_cluster import free_port

from lserve.deployments import serve_environment


def prepare() -> None:
    """What Ray's processes must find in their environment: call it before Ray starts."""
    root = Path(__file__).parents[2]
    paths = [root, root / "tests" / "deployments", root / "tests" / "e2e"]
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    serve_environment.apply()


def deploy(**sections: dict[str, Any]) -> str:
    """Starts Serve and the application on the running Ray cluster; returns its URL. sections: of the settings."""
    from fake_pool import ByteTokenizer
    from ray import serve
    from stub_worker import StubWorker

    from lserve.deployments.app import bind_router, worker
    from lserve.deployments.settings import load_settings

    port = free_port()
    settings = load_settings({"model": {"path": "stub", "served_name": "stub"}, **sections})
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(bind_router(settings, worker(StubWorker, settings.decode).bind(0.02), ByteTokenizer()), name="stub")
    return f"http://127.0.0.1:{port}"
