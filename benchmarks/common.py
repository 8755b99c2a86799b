"""What the model benchmarks share: real text, engines over the demo model, tables and results."""

import json
import math
import platform
import pydoc_data.topics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lserve.cli.demo_model import demo_model
from lserve.engine.config import EngineConfig
from lserve.engine.engine import Engine
from lserve.engine.loading import LoadedModel, load
from lserve.engine.request import AttentionOptions, Request, SamplingParams

RESULTS = Path(__file__).parent / "results"


def long_text(path: str | None = None) -> str:
    """English prose: a file, or Python's own language reference, which every interpreter carries (465,000
    characters).
    """
    if path is not None:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return "\n\n".join(pydoc_data.topics.topics.values())


def demo_engine(loaded: LoadedModel | None = None, **settings: object) -> Engine:
    """An engine over the demo model (or what is already loaded, when only cache or scheduler settings differ)."""
    config = EngineConfig(model=str(demo_model()), **settings)  # type: ignore[arg-type]
    return Engine(config, loaded or load(config))


def run_greedy(engine: Engine, prompt: Sequence[int], max_tokens: int, dense: bool = False) -> tuple[str, float, float]:
    """One request alone: its text, seconds to the first token, and milliseconds for each token after it."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    request = Request(f"bench-{time.monotonic_ns()}", tuple(prompt), params, AttentionOptions(dense=dense))
    start = time.perf_counter()
    engine.add_request(request)
    text, times = "", []
    while engine.has_work:
        result = engine.step()
        assert not result.errors, result.errors
        for output in result.outputs:
            text += output.text
            times.append(time.perf_counter())
    tpot_ms = (times[-1] - times[0]) / max(len(times) - 1, 1) * 1e3
    return text, times[0] - start, tpot_ms


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson score)."""
    z, p = 1.96, right / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their longest cell."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def environment(commit: str | None = None) -> dict[str, object]:
    """What a result depends on besides the code: hardware and versions. commit: None asks git."""
    return {
        "commit": _commit() if commit is None else commit,
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def report(name: str, results: dict[str, object], write: bool) -> None:
    """Prints one line of JSON with the hardware; writes it to benchmarks/results/ when asked to."""
    line = json.dumps({"benchmark": name, **environment(), **results})
    print(line)
    if write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(line + "\n")


def with_rule(engine: Engine, rule: str, candidate_factor: int, token_budget: int) -> None:
    """Changes how an idle engine selects pages; its pages and prefix cache stay."""
    changed = replace(engine.runner.sparsity, candidate_factor=candidate_factor, token_budget=token_budget)
    engine.runner.sparsity = replace(changed, rule=rule)  # type: ignore[arg-type]


def _commit() -> str:
    """The checkout's commit, where there is a checkout and git."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())
