"""Looks for tiles of the low-bit decode linears on a GPU, judged by a Llama-3-8B layer's four linears in one graph.

    python benchmarks/bench_linear.py [--formats w4a8 fp8] [--batches 1 16] [--json FILE]

From the launcher's tiles on, every matrix in turn tries all tiles while the others keep their best ones; what is found
goes into `lserve.kernels.gpu.linear.decode_tiles`. Beside it, the same layer with every kernel waiting for the one
ahead of it to finish. `bench_kernels.py` times the layers as they are.
"""

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from bench_kernels import environment
from kernel_timing import graph_us, measure_ceilings
from kernels_layers import (
    FEED_FORWARD,
    FORM,
    HIDDEN,
    LAYER,
    Weight,
    random_activation,
    random_layers,
    random_weight,
    weight_bytes,
)

from lserve.kernels.activation_format import QuantizedActivation
from lserve.kernels.gpu import linear as gpu_linear
from lserve.kernels.gpu.linear import DecodeTiles
from lserve.kernels.weight_format import CHUNK, W4Weight

SHAPES = [(16, 4, 4), (16, 8, 4), (16, 8, 8), (32, 2, 4), (32, 4, 4), (32, 8, 4), (32, 8, 8)]
SHAPES += [(64, 2, 4), (64, 4, 4), (64, 4, 8), (64, 1, 4), (128, 1, 4)]
"""(columns, slots, warps) of decode tiles that are worth timing; one slot is for W4A8 alone."""

KERNELS = ("w4a8_decode_kernel", "w4a8_wide_kernel", "w8a8_decode_kernel")


def sweep_tiles(form: str, batch: int, num_channels: int) -> list[DecodeTiles]:
    """Decode tiles worth timing."""
    block_m = min(max(triton.next_power_of_2(batch), 8), 64)
    found = []
    for (block_n, slots, warps), stages, prefetch in itertools.product(SHAPES, (2, 3, 4, 6), (0, 8, 24)):
        if form != "w4a8" and (slots == 1 or prefetch):
            continue
        if prefetch > num_channels // CHUNK:
            continue
        if form == "w4a8" and block_m > 32 and slots > 1:
            continue
        if stages < 6 or slots == 1:
            found.append(DecodeTiles(block_m, block_n, slots, warps, stages, prefetch))
    return found


def decode(x: QuantizedActivation, weight: Weight, tiles: DecodeTiles) -> torch.Tensor:
    """A decode launch with given tiles."""
    launch = gpu_linear.launch_w4a8_decode if isinstance(weight, W4Weight) else gpu_linear.launch_w8a8_decode
    return launch(x, weight, None, torch.bfloat16, tiles)


def warm(jobs: Sequence[tuple[str, int, DecodeTiles]]) -> None:
    """Compiles kernels into triton's cache (in a process of its own)."""
    for form, batch, tiles in jobs:
        with suppress(triton.runtime.errors.OutOfResources):
            x = random_activation(batch, FEED_FORWARD, FORM[form])
            decode(x, random_weight(form, 4096, FEED_FORWARD), tiles)


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, every linear layer waits for the kernel ahead of it to finish before it starts."""

    class Waiting:
        def __init__(self, kernel: triton.runtime.JITFunction) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            return lambda *arguments, **options: self._kernel[grid](*arguments, **{**options, "launch_pdl": False})

    kept = {name: getattr(gpu_linear, name) for name in KERNELS}
    for name, kernel in kept.items():
        setattr(gpu_linear, name, Waiting(kernel))
    try:
        yield
    finally:
        for name, kernel in kept.items():
            setattr(gpu_linear, name, kernel)


def sweep(form: str, batch: int, copy: float) -> list[dict[str, object]]:
    """Prints the best tiles of each matrix; returns all that were tried, with the time of the whole layer."""
    layers = random_layers(form)
    inputs = {width: random_activation(batch, width, FORM[form]) for width in (HIDDEN, FEED_FORWARD)}
    best = {name: gpu_linear.decode_tiles(batch, *LAYER[name], w.codes.dtype) for name, w in layers[0].items()}
    floor = sum(map(weight_bytes, layers[0].values())) / copy * 1e6

    def layer_us(tiles: dict[str, DecodeTiles], repeats: int = 7) -> float:
        calls = [partial(decode, inputs[LAYER[n][1]], w, tiles[n]) for layer in layers for n, w in layer.items()]
        return graph_us(calls, repeats) * len(LAYER)

    tried: list[dict[str, object]] = []
    best_us = chosen_us = layer_us(best)
    for name in LAYER:
        for tiles in sweep_tiles(form, batch, LAYER[name][1]):
            with suppress(triton.runtime.errors.OutOfResources):
                us = layer_us(best | {name: tiles})
                tried.append({"form": form, "batch": batch, "matrix": name, "us": us, **asdict(tiles)})
                if us < best_us - 0.05:
                    best_us, best = us, best | {name: tiles}
    best_us = layer_us(best, 31)
    with waiting():
        alone_us = layer_us(best)
    print(f"{form} batch {batch}: launcher's tiles {chosen_us:.2f} us, best {best_us:.2f} us", end=" ")
    print(f"({floor / best_us:.3f} of bandwidth), without overlap {alone_us:.2f} us", flush=True)
    for name, tiles in best.items():
        print(f"    {name}: {tiles}", flush=True)
    return tried


def main() -> None:
    """Compiles in parallel, then times; prints what is best and writes all that was tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["w4a8", "fp8"], choices=list(FORM))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--processes", type=int, default=14, help="processes that compile")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_linear needs a CUDA device")
    pairs = list(itertools.product(options.formats, options.batches))
    jobs = [(*pair, tiles) for pair in pairs for tiles in sweep_tiles(*pair, FEED_FORWARD)]
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm, [jobs[i :: options.processes] for i in range(options.processes)]))
    ceilings = measure_ceilings()
    print(environment(), f"copy {ceilings.copy / 1e12:.2f} TB/s")
    tried = [row for pair in pairs for row in sweep(*pair, ceilings.copy)]
    if options.json:
        about = environment() | {"copy_TB_s": ceilings.copy / 1e12}
        options.json.write_text(json.dumps({"about": about, "sweep": tried}, indent=1))


if __name__ == "__main__":
    main()
