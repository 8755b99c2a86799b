"""The rules that hold the tree together: who imports whom, what needs no torch, what is documented."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lserve

ROOT = Path(__file__).parent.parent
ROOMS = ("kernels", "engine", "deployments", "quality", "poc", "cli")
"""A room imports those before it, never those after it."""

HOST_POLICY = ("chain", "config", "errors", "leases", "page_pool", "prefix_index", "request", "scheduler")


def folder(room: str) -> Path:
    return ROOT / room if room in ROOMS[:3] else ROOT / "lserve" / room


def modules(room: str) -> list[Path]:
    return sorted(path for path in folder(room).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path, room: str) -> Iterator[str]:
    """Full names of what a module imports anywhere in its body."""
    package = ["lserve", room, *path.relative_to(folder(room)).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            if name in {"lserve", *(f"lserve.{r}" for r in ROOMS)}:
                yield from (f"{name}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    later = ROOMS[ROOMS.index(room) + 1 :]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(room)
        for name in imports(path, room)
        if name.split(".")[0] == "lserve" and name.split(".")[1:2] and name.split(".")[1] in later
    ]
    assert modules(room)
    assert wrong == []


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("kernels")
        for name in imports(path, "kernels")
        if name.split(".")[0] not in allowed and not name.startswith("lserve.kernels")
    ]
    assert wrong == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_names_its_own_modules_relatively_and_others_in_full(room: str) -> None:
    """`lserve.engine.x` inside the engine, or a bare `engine.x`, would be a second copy of the module."""
    bare = set(ROOMS[:3])
    wrong = []
    for path in modules(room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                root, _, rest = node.module.partition(".")
                is_own = root == "lserve" and rest.split(".")[0] == room and path.name != "compile_check.py"
                if is_own or root in bare:
                    wrong.append(f"{path.relative_to(ROOT)}: from {node.module}")
    assert wrong == []


def test_host_policy_brings_no_torch() -> None:
    names = ", ".join(f"lserve.engine.{module}" for module in HOST_POLICY)
    code = f"import sys, lserve, {names}; assert 'torch' not in sys.modules, 'torch'; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_public_names_resolve() -> None:
    for name in lserve.__all__:
        assert getattr(lserve, name).__name__ == name
    assert set(lserve.__all__) <= set(dir(lserve))
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = lserve.Motor


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Functions, classes and methods that other modules may use; jitted kernels belong to their launcher."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("room", ROOMS)
def test_everything_public_has_a_docstring(room: str) -> None:
    missing = []
    for path in modules(room):
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            missing.append(f"{path.relative_to(ROOT)}: module")
        for name, node in public(tree):
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if ast.get_docstring(node) is None:
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []


def test_no_file_grows_past_400_lines() -> None:
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "__pycache__" not in path.parts]
    paths = [path for room in ROOMS for path in modules(room)] + tests
    assert [f"{p.relative_to(ROOT)}: {n}" for p in paths if (n := len(p.read_text().splitlines())) > 400] == []


def test_the_links_in_the_package_lead_to_the_folders_at_the_root() -> None:
    for room in ROOMS[:3]:
        link = ROOT / "lserve" / room
        assert link.is_symlink()
        assert os.readlink(link) == f"../{room}"


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == lserve.__version__
    assert f"## {lserve.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"serve", "test"} <= set(re.findall(r"\bmake ([a-z]+)\b", readme)) <= targets
    help_text = subprocess.run(
        [sys.executable, "-m", "lserve.cli.main", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for command in set(re.findall(r"\blserve ([a-z]+)\b(?! is)", "\n".join(code_blocks(readme)))):
        assert re.search(rf"^ +{command}\b", help_text, re.MULTILINE), command


def test_the_paths_in_the_documentation_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def code_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```(?:sh|text)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
