"""The Dockerfile passes hadolint, and its parts agree with the rest of the tree."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

from rendered import find_tool

ROOT = Path(__file__).parents[2]


def test_hadolint_finds_nothing() -> None:
    command = [find_tool("hadolint"), "--format", "json", str(ROOT / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert [(finding["line"], finding["code"], finding["message"]) for finding in json.loads(result.stdout)] == []


def test_versions_are_those_of_the_project() -> None:
    text = (ROOT / "Dockerfile").read_text()
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (ray,) = re.findall(r"^ray\[serve\]==(\S+)$", "\n".join(dependencies), re.MULTILINE)
    (torch,) = re.findall(r"^TORCH_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"RAY_VERSION={ray}" in text
    assert f"TORCH_VERSION={torch}" in text


def test_it_runs_as_nobody_and_says_how_it_is() -> None:
    text = (ROOT / "Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users[-1] == "1000:100"
    assert re.search(r"^HEALTHCHECK ", text, re.MULTILINE)
    assert re.search(r"^VOLUME ", text, re.MULTILINE)


def test_what_is_no_part_of_the_image_stays_out() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "tests", "benchmarks"} <= set(ignored)
