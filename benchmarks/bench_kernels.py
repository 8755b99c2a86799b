"""Times every kernel on a GPU beside its floor, in one run: `python benchmarks/bench_kernels.py [--only SECTION ...]`.

A floor is bytes over the copy bandwidth or operations over the matrix rate, both measured here, or a rival in the
same run. `fraction` is
floor time over measured time: 1 is perfect. The last line is JSON. Inputs are random; repeated calls rotate among
buffers larger than the L2.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from kernel_timing import Ceilings, Row, measure_ceilings

MODULES = ("kernels_decode", "kernels_prefill", "kernels_layers")
"""Files beside this one with a dict SECTIONS: name to a function of Ceilings that returns rows."""


def sections() -> dict[str, Callable[[Ceilings], list[Row]]]:
    """All sections of the modules that are there, in order."""
    here = Path(__file__).parent
    found: dict[str, Callable[[Ceilings], list[Row]]] = {}
    for name in MODULES:
        if (here / f"{name}.py").exists():
            found |= importlib.import_module(name).SECTIONS
    return found


def environment() -> dict[str, str]:
    """Hardware, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda or "", "commit": commit or "unknown",
    }  # fmt: skip


def show(rows: list[Row]) -> None:
    """The table."""
    print(f"{'section':<16} {'case':<34} {'us':>10} {'fraction':>8} {'of':<10} bar")
    for row in rows:
        fraction = "" if row.fraction is None else f"{row.fraction:.3f}"
        bar = "" if not row.bar else f"{row.bar}: {'met' if row.met else 'MISSED'}"
        print(f"{row.section:<16} {row.case:<34} {row.us:>10.2f} {fraction:>8} {row.floor:<10} {bar}")


def main() -> int:
    """Runs the sections, prints the table and one JSON line."""
    known = sections()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(known), default=list(known), help="sections to run")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1
    ceilings = measure_ceilings()
    rows: list[Row] = []
    for name in arguments.only:
        rows += known[name](ceilings)
        torch.cuda.empty_cache()
    show(rows)
    result = {"environment": environment(), "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}
    print(f"copy {ceilings.copy / 1e12:.2f} TB/s, read {ceilings.read / 1e12:.2f} TB/s", end=", ")
    print(f"bf16 {ceilings.bf16 / 1e12:.0f} TFLOP/s")
    line = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
