"""`lserve drain`: takes this machine out of a Ray cluster without breaking a request; for preStop hooks."""

import argparse
import sys

from .ray_cluster import connect


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `drain` to the command line."""
    parser = commands.add_parser(
        "drain",
        allow_abbrev=False,
        help="take this machine out of a Ray cluster",
        description="Moves the workers of this machine to others and waits until nothing is served here any more.",
    )
    parser.add_argument("--timeout-s", type=float, default=300.0, help="how long that may take; default: %(default)g")
    parser.set_defaults(run=run, takes_settings=False)


def run(options: argparse.Namespace) -> int:
    """0 when the machine serves nothing any more, 1 when time ran out. Raises LServeError."""
    import ray

    from lserve.deployments.node_drain import drain_node, serving_actors

    connect()
    node_id = ray.get_runtime_context().get_node_id()
    if drain_node(node_id, options.timeout_s):
        return 0
    print(f"lserve: still serving after {options.timeout_s:g} s: {', '.join(serving_actors(node_id))}", file=sys.stderr)
    return 1
