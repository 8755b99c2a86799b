"""Commands and tables of the guides: marked commands run, all others name things that exist."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from documentation import ROOT, Block, blocks, commands

from lserve.cli.main import _parser, split_settings
from lserve.deployments.settings import load_settings
from lserve.engine.config import CacheConfig
from lserve.kernels.slot_layout import make_slot_layout

SHELL = list(blocks("sh"))
OTHERS = {"cd", "curl", "docker", "git", "helm", "kubectl", "ray", "umask"}
"""Programs whose own options are not ours to check."""


@pytest.mark.parametrize("block", [b for b in SHELL if b.run == "run"], ids=lambda block: block.place)
def test_a_marked_block_runs(block: Block, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "lserve").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lserve.cli.main "$@"\n')
    (programs / "lserve").chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_some_blocks_are_marked() -> None:
    assert len([block for block in blocks("sh", "python") if block.run]) >= 7


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_every_command_names_things_that_exist(block: Block) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(block):
        program, *arguments = shlex.split(command.replace("<this repository>", "URL"))
        name = Path(program).name
        if name == "lserve":
            rest, _ = split_settings(arguments)
            if rest != ["--help"]:
                _parser().parse_args(rest)
        elif name == "make":
            assert {word for word in arguments if "=" not in word} <= targets, command
        elif name in ("python", "python3") or "/" in program:
            script = program if "/" in program and name not in ("python", "python3") else arguments[0]
            assert (ROOT / script).exists() or script == "-m", command
        else:
            assert name in OTHERS, f"{command}: a new kind of command; check it here or run it"
        for before, path in zip(arguments, arguments[1:], strict=False):
            if before in ("-k", "-f", "kustomize") and not path.startswith("~"):
                assert (ROOT / path).exists(), command


@pytest.mark.parametrize("block", list(blocks("yaml")), ids=lambda block: block.place)
def test_every_settings_file_is_valid(block: Block, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(block.text)
    assert load_settings(tmp_path / "serve.yaml").model.path


def sizing() -> ModuleType:
    """docs/sizing.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("sizing", ROOT / "docs" / "sizing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sizing"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_sizing_tables_are_those_of_the_engine() -> None:
    module, page = sizing(), ROOT / "docs" / "operations.md"
    assert module.written(page.read_text()) == page.read_text(), "python docs/sizing.py --write"


def test_what_the_guide_says_about_other_page_formats() -> None:
    size = {
        kv_dtype: make_slot_layout(kv_dtype, 128, CacheConfig().logical_page_size, 64).slot_bytes
        for kv_dtype in ("int4", "k8v4", "int8")
    }
    assert size["int8"] / size["int4"] == pytest.approx(2, abs=0.15)
    assert size["k8v4"] / size["int4"] == pytest.approx(1.5, abs=0.1)


def test_tensor_parallelism_is_denied_where_one_would_look() -> None:
    for name in ("quickstart.md", "operations.md", "tuning.md"):
        assert "ensor parallel" in (ROOT / "docs" / name).read_text(), name
