"""The slow proofs passed when they last ran (`make proofs`): what benchmarks/results/proofs.json says of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS: dict[str, dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / "proofs.json").read_text())

THREE_NODES = "tests/e2e/test_three_nodes.py::test_"
CUT = THREE_NODES + "a_cable_that_is_cut_in_mid_prefill_costs_time_only"
CROSSED = THREE_NODES + "a_request_crosses_the_nodes_and_its_pages_travel_over_tcp"
RAY_UP = "tests/e2e/test_ray_up.py::test_ray_up_serves_and_ray_down_leaves_nothing"
NODES = "tests/e2e/test_autoscaled_nodes.py::test_load_brings_decode_nodes_idleness_removes_them_and_no_request_fails"
REDEPLOY = "tests/e2e/test_redeploy.py::test_no_stream_notices_that_every_replica_is_replaced"


@pytest.mark.parametrize("name", [CROSSED, CUT, RAY_UP, NODES, REDEPLOY])
def test_the_proof_passed_and_is_still_there(name: str) -> None:
    assert RESULTS[name]["outcome"] == "passed"
    path, _, function = name.partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_figures_of_the_proofs() -> None:
    assert RESULTS[CUT]["status"] == 200 and RESULTS[CUT]["answered_after_s"] < 95
    assert RESULTS[CROSSED]["bytes_from_prefill"] > 10_000_000
    assert RESULTS[REDEPLOY]["complete"] >= 24 and RESULTS[REDEPLOY]["failed"] == 0
    first, most, last = RESULTS[NODES]["nodes"]
    assert first == last == 1 < most and RESULTS[NODES]["failed"] == 0
