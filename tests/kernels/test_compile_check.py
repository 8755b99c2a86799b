"""The offline compile check: compiles a listed case without a GPU, and fails where a promise is not kept."""

import os
import subprocess
import sys

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def test_a_listed_case_compiles_for_hopper():
    done = run("-m", "lserve.kernels.compile_check", "--only", "read int4")
    assert done.returncode == 0, done.stderr
    assert "_read_pages_kernel" in done.stdout and "1 variants, 0 failures" in done.stdout


def test_a_broken_promise_fails():
    """The page reader has no matrix product; a case that promises wgmma of it must fail."""
    code = (
        "from lserve.kernels.compile_check import Case, check; from lserve.kernels.compile_decode import read; "
        "print(check([Case('x', lambda: read('int4'), wgmma=('_read_pages_kernel',))]))"
    )
    done = run("-c", code)
    assert "x: _read_pages_kernel does not use wgmma on sm_90" in done.stdout, done.stderr


def test_every_operation_is_listed():
    code = "from lserve.kernels.compile_check import listed_cases; print(*(c.name for c in listed_cases()), sep='\\n')"
    names = run("-c", code).stdout.splitlines()
    for operation in ("decode", "select", "write", "read", "prefill", "prefill_blocks", "w8a8", "w4a8"):
        assert any(name.startswith(operation) for name in names), operation
