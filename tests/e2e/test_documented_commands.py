"""The guides' commands against a running cluster, as they are printed but for the address."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import ROOT, Block, blocks
from running_cluster import RunningCluster

SERVED = [block for block in blocks("sh", "python") if block.run == "run: served"]


@pytest.mark.slow
@pytest.mark.parametrize("block", SERVED, ids=lambda block: block.place)
def test_a_documented_command_gets_its_answer(block: Block, running: RunningCluster, tmp_path: Path) -> None:
    address = running.url.removeprefix("http://")
    assert re.search(r"127\.0\.0\.1:8000|lserve status", block.text)
    text = block.text.replace("127.0.0.1:8000", address).replace("lserve status", f"lserve status --url {running.url}")
    (tmp_path / "lserve").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lserve.cli.main "$@"\n')
    (tmp_path / "lserve").chmod(0o755)
    text = text.replace(".venv/bin/lserve", "lserve")
    shell = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(
        [sys.executable, "-c", text] if block.language == "python" else shell,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout
