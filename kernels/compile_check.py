"""`python -m lserve.kernels.compile_check`: compiles the kernels offline and reads what the compiler made of them.

No GPU is needed. Each case calls an operation's launcher on CPU tensors of a real shape; the launches are recorded
instead of run, so the very constants and specializations of production are compiled. Prints registers, spills, shared
memory and the matrix instruction; fails on spills, or where a case that promises wgmma has none.
"""

import argparse
import contextlib
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction, mangle_type

LISTS = {"compile_decode": "DECODE_CASES", "compile_prefill": "PREFILL_CASES", "compile_linear": "LINEAR_CASES"}
"""Modules beside this one and their lists of cases; at most 60 variants in all."""

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_pdl")


@dataclass(frozen=True)
class Case:
    """One listed variant.

    name: operation and shape. launch: calls the launcher. wgmma: kernels (by name) that must use wgmma on sm_90.
    capabilities: compute capabilities to compile for.
    """

    name: str
    launch: Callable[[], object]
    wgmma: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = (90,)


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the jitted function, its arguments by name, and compile options."""

    function: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel; registers per thread, spills in bytes per thread, shared memory in
    bytes.
    """

    kernel: str
    capability: int
    registers: int
    spills: int
    shared: int
    matrix: str


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of running them."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        for parameter in self.params:
            if parameter.name not in arguments:
                arguments[parameter.name] = parameter.default
        launches.append(Launch(self, arguments, {k: v for k, v in kwargs.items() if k in OPTIONS}))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def _type_name(dtype: torch.dtype) -> str:
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "bool": "i1", "uint8": "u8"}
    names |= {
        "float8_e4m3fn": "fp8e4nv",
        "float8_e5m2": "fp8e5",
        "int8": "i8",
        "int16": "i16",
        "int32": "i32",
        "int64": "i64",
    }
    return names[str(dtype).removeprefix("torch.")]


def source(launch: Launch) -> ASTSource:
    """The launch as triton's compiler wants it: types, constants, and the divisibility that it would have found."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = "*" + _type_name(value.dtype), True
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        elif type(value).__name__ == "TensorDescriptor":
            signature[parameter.name] = mangle_type(value)
        else:
            raise TypeError(f"{launch.function.__name__}: argument {parameter.name} of type {type(value).__name__}")
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    keys = {(launch.function.arg_names.index(name),): value for name, value in constants.items()}
    kind = GluonASTSource if isinstance(launch.function, GluonJITFunction) else ASTSource
    return kind(launch.function, signature, keys, attributes)


def compile_launch(launch: Launch, capability: int) -> Any:
    """The compiled kernel; `.asm` has its ptx and cubin."""
    options = {k: v for k, v in launch.options.items() if v is not None}
    return triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=options)


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassemble(cubin: bytes, *flags: str) -> str:
    """cuobjdump's output for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_tool("cuobjdump"), *flags, file.name], capture_output=True, text=True, check=True
        ).stdout


def report(launch: Launch, capability: int) -> Report:
    """Compiles one launch for one capability and reads its resources."""
    kernel = compile_launch(launch, capability)
    usage = disassemble(kernel.asm["cubin"], "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL"))
    instructions = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", kernel.asm["ptx"])
    matrix = ", ".join(sorted(set(instructions))) or "-"
    return Report(launch.function.__name__, capability, registers, stack + local, kernel.metadata.shared, matrix)


def check(cases: list[Case]) -> list[str]:
    """Compiles every case, prints a table and returns what failed."""
    failures: list[str] = []
    seen: set[str] = set()
    print(f"{'case':<44} {'kernel':<26} {'sm':>3} {'regs':>4} {'spill':>5} {'shared':>7}  matrix")
    for case in cases:
        with recorded() as launches:
            case.launch()
        for launch in launches:
            for capability in case.capabilities:
                variant = f"{source(launch).hash()} {launch.options} {capability}"
                if variant in seen:
                    continue
                seen.add(variant)
                result = report(launch, capability)
                print(
                    f"{case.name:<44} {result.kernel:<26} {capability:>3} {result.registers:>4} {result.spills:>5} "
                    f"{result.shared:>7}  {result.matrix}",
                    flush=True,
                )
                if result.spills:
                    failures.append(f"{case.name}: {result.kernel} spills {result.spills} bytes on sm_{capability}")
                if capability == 90 and result.kernel in case.wgmma and "wgmma" not in result.matrix:
                    failures.append(f"{case.name}: {result.kernel} does not use wgmma on sm_90")
    print(f"{len(seen)} variants, {len(failures)} failures")
    return failures


def listed_cases() -> list[Case]:
    """The cases of all lists that are there."""
    cases: list[Case] = []
    for module, name in LISTS.items():
        if importlib.util.find_spec(f"{__package__}.{module}"):
            cases += getattr(importlib.import_module(f".{module}", __package__), name)
    return cases


def main() -> int:
    """Command line: `--only TEXT` restricts the cases to names that contain TEXT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="compile only the cases whose name contains this")
    arguments = parser.parse_args()
    failures = check([case for case in listed_cases() if arguments.only in case.name])
    for failure in failures:
        print(failure, file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
