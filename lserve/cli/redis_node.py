"""`lserve redis`: keeps prefix pages on a node of the Ray cluster; prints what the settings need to reach it."""

import argparse
import json
from dataclasses import asdict

from .ray_cluster import connect


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `redis` to the command line."""
    parser = commands.add_parser(
        "redis",
        allow_abbrev=False,
        help="start Redis on a node of a Ray cluster",
        description="Starts Redis, with TLS and a password, on the cluster's node that has the resource lserve_redis,"
        " unless it runs already. Prints the `redis:` section of the settings as JSON, which is YAML too. The server"
        " ends with Ray.",
    )
    parser.add_argument("--memory-gib", type=float, default=16.0, help="what pages may take; default: %(default)g")
    parser.add_argument("--port", type=int, default=6380, help="default: %(default)d")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="how long to wait; default: %(default)g")
    parser.set_defaults(run=run, takes_settings=False)


def run(options: argparse.Namespace) -> int:
    """Starts Redis through the Ray cluster that this machine belongs to. Raises LServeError."""
    from lserve.deployments.redis_node import start_redis

    connect()
    endpoint = start_redis(int(options.memory_gib * (1 << 30)), options.port, options.timeout_s)
    print(json.dumps(asdict(endpoint)))
    return 0
