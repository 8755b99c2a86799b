"""Runs a script as if it were alone on its machine: own processes, own network (loopback only), all gone at its end.

So `ray stop`, which Ray's own tools call, ends nobody else's Ray. Needs root and util-linux.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

UNSHARE = ("unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child")


def why_not() -> str | None:
    """Why that cannot be done here; None when it can."""
    if os.geteuid() != 0:
        return "process and network namespaces need root"
    missing = [program for program in ("unshare", "ip") if shutil.which(program) is None]
    if missing:
        return f"process and network namespaces need {' and '.join(missing)}"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return f"process and network namespaces are refused here: {tried.stderr.strip()}" if tried.returncode else None


def run_sealed(script: Path, *arguments: str, environment: Mapping[str, str], timeout_s: float) -> str:
    """What the Python script prints. AssertionError with all it said when it fails."""
    command = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, str(script), *arguments]
    done = subprocess.run(
        [*UNSHARE, *command], env=dict(environment), capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
