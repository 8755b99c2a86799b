"""Ray's autoscaler with its fake provider: decode nodes come with load and go with it."""

import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sealed import run_sealed, why_not

from lserve.deployments.serve_environment import SERVE_ENVIRONMENT

pytestmark = [pytest.mark.proof, pytest.mark.timeout(500)]

HERE = Path(__file__).parent


def test_load_brings_decode_nodes_idleness_removes_them_and_no_request_fails(
    tiny_model: Path, record_property: Callable[[str, object], None]
) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    environment = {
        **os.environ,
        **SERVE_ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}",
        "LSERVE_CLUSTER_SECRET": secrets.token_hex(32),
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "UCX_NET_DEVICES": "lo",
        "OMP_NUM_THREADS": "1",
    }
    output = run_sealed(HERE / "autoscaled_nodes.py", str(tiny_model), environment=environment, timeout_s=450)
    (said,) = (line for line in output.splitlines() if line.startswith("{"))
    report = json.loads(said)
    for name in ("nodes", "complete", "grew_s", "shrank_s"):
        record_property(name, report[name])
    record_property("failed", len(report["failed"]))
    assert report["failed"] == [] and report["complete"] > 8
    first, most, last = report["nodes"]
    assert first == last == 1 < most <= 3
