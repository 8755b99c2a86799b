"""The Dockerfile passes hadolint, and its parts agree with the rest of the tree."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
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


def test_the_wheel_of_the_image_holds_the_whole_package(tmp_path: Path) -> None:
    """Of a copy without what .dockerignore names, as the image's first stage sees it."""
    away = shutil.ignore_patterns(*(name.removeprefix("**/") for name in (ROOT / ".dockerignore").read_text().split()))
    shutil.copytree(ROOT, tmp_path / "lserve", symlinks=True, ignore=away)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, tmp_path / "lserve"], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    folders = [ROOT / "lserve", *(ROOT / name for name in ("engine", "kernels", "deployments"))]
    missing = [
        str(path.relative_to(ROOT))
        for folder in folders
        for path in folder.rglob("*")  # follows no links
        if path.is_file() and path.suffix in (".py", ".txt", ".json", ".yaml", ".typed") and "results" not in path.parts
        if str(Path("lserve") / path.relative_to(ROOT / "lserve" if folder.name == "lserve" else ROOT)) not in held
    ]
    assert missing == []
