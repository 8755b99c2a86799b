"""Ray on this machine: what a failed start says, and what is watched while it runs."""

import subprocess
import sys

import psutil
import pytest

from lserve.cli.local_cluster import _reason, watch
from lserve.engine.errors import LServeError

REPORT = """\
The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:lserve:DecodeWorker.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "worker.py", line 32, in __init__
    self.engine = Engine(config, load(config))
lserve.engine.errors.SettingsError: cache.retrieval_pool_bytes 1000 holds 0 pages
"""


def test_a_failed_start_is_told_in_the_workers_own_words() -> None:
    assert _reason(["Deploying application lserve failed.", "", REPORT]) == (
        "a worker did not start: SettingsError: cache.retrieval_pool_bytes 1000 holds 0 pages"
    )


def test_without_an_exception_the_whole_report_is_told() -> None:
    assert _reason(["Deploying failed:", "no node fits"]) == "a worker did not start: Deploying failed: no node fits"


def test_watching_ends_when_a_process_does() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        watched = psutil.Process(process.pid)
        name = watched.name()
        assert process.stdin is not None
        process.stdin.close()
        with pytest.raises(LServeError, match=f"Ray's {name} ended unexpectedly"):
            watch([watched])
