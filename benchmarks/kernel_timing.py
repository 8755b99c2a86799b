"""Timing on a GPU: CUDA graph replays, medians, and ceilings measured in the same run."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One measured case.

    us: median time of one call. floor: what the floor is made of ("bytes", "operations" or a named rival). fraction:
    floor time over measured time. bar: what must hold, in words, or empty. met: whether it does (None without a bar).
    """

    section: str
    case: str
    us: float
    floor: str = ""
    fraction: float | None = None
    bar: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Ceilings:
    """The card's rates: bytes per second of a large copy (read and written both counted) and of a large read,
    operations per second of large products.
    """

    copy: float
    read: float
    bf16: float


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 15, rounds: int = 1) -> float:
    """Median microseconds of one call. All calls (on different buffers, so that no cache helps) are captured into one
    graph.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def copy_us(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], repeats: int = 15, rounds: int = 4) -> float:
    """Median microseconds of one plain copy (target, source), launched one by one: inside a graph a copy becomes a
    slower memcpy node.
    """
    times = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            for target, source in pairs:
                target.copy_(source)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(pairs)))
    return statistics.median(times[2:])


def measure_ceilings() -> Ceilings:
    """Copies and reads 4 GB, multiplies 8192-cubed."""
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda").view(torch.int64)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / copy_us([(target, source)]) * 1e6
    read = source.nbytes / graph_us([lambda: source.view(torch.float32).amax()]) * 1e6
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    bf16 = 2 * 8192**3 / graph_us([lambda: a @ b], rounds=3) * 1e6
    return Ceilings(copy, read, bf16)
