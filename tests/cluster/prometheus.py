"""Prometheus' own programs: installed ones, or those of Debian's package, unpacked into a cache without installing."""

import shutil
import subprocess
from pathlib import Path

import pytest

CACHE = Path.home() / ".cache" / "lserve" / "prometheus"


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`; skips the test where neither it nor Debian's package can be had."""
    unpacked = CACHE / "usr" / "bin" / name
    found = shutil.which(name) or (str(unpacked) if unpacked.exists() else None)
    if found is not None:
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip(f"{name} is not installed, and this is no Debian to fetch it from")
    CACHE.mkdir(parents=True, exist_ok=True)
    fetched = subprocess.run(["apt-get", "download", "prometheus"], cwd=CACHE, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"{name} is not installed, and Debian's package cannot be fetched: {fetched.stderr.strip()}")
    for package in CACHE.glob("prometheus_*.deb"):
        subprocess.run(["dpkg", "-x", package, CACHE], check=True)
        package.unlink()
    return str(unpacked)
