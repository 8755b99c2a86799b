"""Keeps what the proofs found (`make proofs`), for a test that has no minutes to spare."""

import json
import os
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "proofs.json"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes down a proof's outcome, seconds and figures, when LSERVE_WRITE_PROOFS is set."""
    if not os.environ.get("LSERVE_WRITE_PROOFS") or "proof" not in report.keywords:
        return
    if report.when != "call" and report.outcome == "passed":
        return
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    figures = dict(report.user_properties)
    kept[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration), **figures}
    RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
