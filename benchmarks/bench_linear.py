"""Linear layers, norms, RoPE and SiLU of a Llama-3-8B layer on one GPU, each beside its floor.

    python -m benchmarks.bench_linear [--json FILE] [--sweep]

Floors: bytes that must move over the copy bandwidth, or operations over the matrix rate, both measured in the same run.
`fraction` is floor / measured. Times are medians of CUDA graph replays over buffers that together exceed the L2, so
launches are part of them, Python is not. `--sweep` first looks for better tiles of the decode kernels.
"""

import argparse
import itertools
import json
import multiprocessing
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton

from lserve.kernels.activation import silu_mul, silu_mul_quantize
from lserve.kernels.activation_format import QuantizedActivation, quantize_activation
from lserve.kernels.gpu import linear as gpu_linear
from lserve.kernels.gpu.linear import DecodeTiles, PrefillTiles
from lserve.kernels.linear import linear_w4a8, linear_w8a8
from lserve.kernels.norm import add_rms_norm, add_rms_norm_quantize, rms_norm_quantize
from lserve.kernels.rope import rope
from lserve.kernels.sample import sample
from lserve.kernels.weight_format import CHUNK, W4Weight, W8Weight

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
FORM = {"w4a8": "int8_sums", "int8": "int8", "fp8": "fp8"}
Weight = W4Weight | W8Weight | torch.Tensor


@dataclass(frozen=True)
class Row:
    """One measured line. us: microseconds; floor_us: the floor; what: bytes or operations that make the floor."""

    name: str
    us: float
    floor_us: float
    what: str

    @property
    def fraction(self) -> float:
        """Floor over measured time."""
        return self.floor_us / self.us


def graph_us(calls: Sequence[Callable[[], object]], replays: int = 15) -> float:
    """Microseconds per call: one graph of all calls, median of replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times[3:])


def event_us(call: Callable[[], object], repeats: int = 9) -> float:
    """Microseconds of one long call, between events: median of repeats."""
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return median(times[2:])


def random_weight(form: str, num_columns: int, num_channels: int) -> Weight:
    """Random codes of a format; levels keep what they decode to within int8."""
    scale = torch.rand(num_columns, device="cuda") * 1e-3 + 1e-4
    if form == "bf16":
        return torch.randn(num_columns, num_channels, device="cuda", dtype=torch.bfloat16)
    if form == "w4a8":
        chunks = triton.cdiv(num_channels, CHUNK)
        codes = torch.randint(0, 256, (chunks, num_columns, CHUNK // 2), dtype=torch.uint8, device="cuda")
        step = torch.randint(1, 9, (chunks, num_columns, 2), dtype=torch.uint8, device="cuda")
        minimum = torch.randint(-100, 0, (chunks, num_columns, 2), dtype=torch.int8, device="cuda").view(torch.uint8)
        levels = torch.stack((step, minimum), -1).view(chunks, num_columns, 4).view(torch.int32).squeeze(-1)
        return W4Weight(codes, levels.contiguous(), scale, num_channels)
    codes = torch.randint(-127, 128, (num_columns, num_channels), dtype=torch.int8, device="cuda")
    return W8Weight(codes if form == "int8" else codes.float().to(torch.float8_e4m3fn), scale)


def weight_bytes(weight: Weight) -> int:
    """Bytes of a weight that a small batch has to read."""
    if isinstance(weight, torch.Tensor):
        return weight.nbytes
    levels = weight.levels.nbytes if isinstance(weight, W4Weight) else 0
    return weight.codes.nbytes + levels + weight.scale.nbytes


def random_activation(num_tokens: int, num_channels: int, form: str) -> QuantizedActivation:
    """Random tokens, quantized."""
    return quantize_activation(torch.randn(num_tokens, num_channels, device="cuda", dtype=torch.bfloat16), form)


def apply(x: QuantizedActivation | torch.Tensor, weight: Weight) -> torch.Tensor:
    """The product that a layer in weight's format computes."""
    if isinstance(weight, torch.Tensor):
        return torch.nn.functional.linear(x, weight)
    return (linear_w4a8 if isinstance(weight, W4Weight) else linear_w8a8)(x, weight, None, torch.bfloat16)


def ceilings() -> dict[str, float]:
    """Bytes per us of a device copy (read + written), operations per us of the matrix unit in each format."""
    halves = torch.randint(0, 256, (2, 1 << 30), dtype=torch.uint8, device="cuda")
    # outside a graph, where a copy is a kernel; a graph makes it a slower node of the copy engine
    found = {"copy": halves.nbytes / event_us(lambda: halves[0].copy_(halves[1]))}
    size = 8192
    operations = 2 * size**3
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    found["bf16"] = operations / graph_us([lambda: a @ b] * 2)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    found["fp8"] = operations / graph_us(
        [lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)] * 2
    )
    ai, bi = torch.randint(-127, 128, (2, size, size), dtype=torch.int8, device="cuda")
    found["int8"] = operations / graph_us([lambda: torch._int_mm(ai, bi.t())] * 2)
    return found


def row_operations(copy: float, num_tokens: int) -> list[Row]:
    """Norms, RoPE and SiLU at num_tokens, by bytes."""
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    count = 4
    x, residual = torch.randn(2, count, num_tokens, HIDDEN, **bf16)
    gate_up = torch.randn(count, num_tokens, 2 * FEED_FORWARD, **bf16)
    qkv = torch.randn(count, num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, **bf16)
    weight = torch.randn(HIDDEN, **bf16)
    cos, sin = torch.rand(2, num_tokens, HEAD_DIM, device="cuda")
    t, h, f = num_tokens, HIDDEN, FEED_FORWARD
    rotated = t * (HEADS + KV_HEADS) * HEAD_DIM
    cases: list[tuple[str, Callable[[int], object], int]] = [
        ("add_rms_norm", lambda i: add_rms_norm(x[i], residual[i], weight, 1e-5), t * h * 8),
        ("rms_norm_quantize int8_sums", lambda i: rms_norm_quantize(x[i], weight, 1e-5, "int8_sums"), t * h * 3),
        (
            "add_rms_norm_quantize fp8",
            lambda i: add_rms_norm_quantize(x[i], residual[i], weight, 1e-5, "fp8"),
            t * h * 7,
        ),
        ("quantize_activation int8", lambda i: quantize_activation(x[i], "int8"), t * h * 3),
        ("rope", lambda i: rope(qkv[i, :, :HEADS], qkv[i, :, HEADS:-KV_HEADS], cos, sin), rotated * 4 + cos.nbytes),
        ("silu_mul", lambda i: silu_mul(gate_up[i]), t * f * 6),
        ("silu_mul_quantize int8_sums", lambda i: silu_mul_quantize(gate_up[i], "int8_sums"), t * f * 5),
        ("silu_mul_quantize fp8", lambda i: silu_mul_quantize(gate_up[i], "fp8"), t * f * 5),
    ]
    rows = []
    for name, call, num_bytes in cases:
        us = graph_us([lambda i=i, call=call: call(i) for i in range(count)])
        rows.append(Row(f"{name} {num_tokens} tokens", us, num_bytes / copy, f"{num_bytes / 1e6:.1f} MB"))
    return rows


def decode_layers(copy: float, batches: Sequence[int]) -> list[Row]:
    """A layer's four linears in one graph, alone and with the norms, SiLU and quantization around them."""
    rows = []
    for form in ("w4a8", "int8", "fp8", "bf16"):
        count = 6 if form == "w4a8" else 4
        layers = [{name: random_weight(form, *shape) for name, shape in LAYER.items()} for _ in range(count)]
        num_bytes = sum(weight_bytes(weight) for weight in layers[0].values())
        for batch in batches:
            inputs = {
                width: torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
                if form == "bf16"
                else random_activation(batch, width, FORM[form])
                for width in (HIDDEN, FEED_FORWARD)
            }

            def linears(layer, inputs=inputs):
                for name, weight in layer.items():
                    apply(inputs[LAYER[name][1]], weight)

            us = graph_us([lambda layer=layer, linears=linears: linears(layer) for layer in layers])
            rows.append(Row(f"{form} layer, batch {batch}", us, num_bytes / copy, f"{num_bytes / 1e6:.1f} MB"))
            if form == "bf16":
                continue
            x, residual, attended = torch.randn(3, batch, HIDDEN, device="cuda", dtype=torch.bfloat16)
            norm = torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16)

            def whole(layer, form=FORM[form], x=x, residual=residual, attended=attended, norm=norm):
                normed, total = add_rms_norm_quantize(x, residual, norm, 1e-5, form)
                apply(normed, layer["qkv"])
                delta = apply(quantize_activation(attended, form), layer["o"])
                normed, total = add_rms_norm_quantize(delta, total, norm, 1e-5, form)
                apply(silu_mul_quantize(apply(normed, layer["gate_up"]), form), layer["down"])

            us = graph_us([lambda layer=layer, whole=whole: whole(layer) for layer in layers])
            rows.append(Row(f"{form} layer + norms, batch {batch}", us, num_bytes / copy, f"{num_bytes / 1e6:.1f} MB"))
        del layers
    return rows


class Waiting:
    """A kernel that is launched without programmatic overlap."""

    def __init__(self, kernel: triton.runtime.JITFunction) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda *arguments, **options: self._kernel[grid](*arguments, **{**options, "launch_pdl": False})


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, every linear layer waits for the kernel ahead of it to finish before it starts."""
    names = ("w4a8_decode_kernel", "w4a8_wide_kernel", "w8a8_decode_kernel")
    kept = {name: getattr(gpu_linear, name) for name in names}
    for name, kernel in kept.items():
        setattr(gpu_linear, name, Waiting(kernel))
    try:
        yield
    finally:
        for name, kernel in kept.items():
            setattr(gpu_linear, name, kernel)


def overlap_gain(copy: float, batches: Sequence[int]) -> list[Row]:
    """The four W4A8 linears with every kernel waiting for the one ahead to finish."""
    layers = [{name: random_weight("w4a8", *shape) for name, shape in LAYER.items()} for _ in range(6)]
    num_bytes = sum(weight_bytes(weight) for weight in layers[0].values())
    rows = []
    for batch in batches:
        inputs = {width: random_activation(batch, width, "int8_sums") for width in (HIDDEN, FEED_FORWARD)}
        calls = [partial(apply, inputs[LAYER[name][1]], weight) for layer in layers for name, weight in layer.items()]
        with waiting():
            us = graph_us(calls) * len(LAYER)
        rows.append(Row(f"w4a8 layer, batch {batch}, no overlap", us, num_bytes / copy, f"{num_bytes / 1e6:.1f} MB"))
    return rows


def sampling(copy: float, batches: Sequence[int]) -> list[Row]:
    """Draws from 128,256 logits; the floor reads them once."""
    rows = []
    for batch in batches:
        logits = torch.randn(batch, 128256, device="cuda") * 2
        ones = torch.ones(batch, device="cuda")
        numbers = torch.rand(batch, device="cuda", dtype=torch.float64)
        for name, heat, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("plain", 0.8, 0, 1.0),
            ("top_k 50, top_p 0.9", 0.8, 50, 0.9),
        ):
            arguments = (logits, ones * heat, ones.int() * top_k, ones * top_p, ones * 0, numbers)
            call = partial(sample, *arguments, filtered=top_p < 1)
            us = graph_us([call] * 4)
            rows.append(Row(f"sample {name}, batch {batch}", us, logits.nbytes / copy, f"{logits.nbytes / 1e6:.1f} MB"))
    return rows


def prefill_layers(rates: dict[str, float], num_tokens: int) -> list[Row]:
    """A layer's four linears at num_tokens; floors by operations at the fp8 rate (int8: its own is printed above)."""
    operations = sum(2 * num_tokens * n * k for n, k in LAYER.values())
    tiles = {
        "128x128": PrefillTiles(128, 128, 128, 8, 4, 3),
        "64x256": PrefillTiles(64, 256, 128, 8, 4, 3),
        "64x128": PrefillTiles(64, 128, 128, 8, 4, 4),
    }
    rows = []
    for form in ("w4a8", "int8", "fp8"):
        layer = {name: random_weight(form, *shape) for name, shape in LAYER.items()}
        inputs = {width: random_activation(num_tokens, width, FORM[form]) for width in (HIDDEN, FEED_FORWARD)}
        variants: dict[str, Callable[[QuantizedActivation, Weight], object]] = {"launcher": apply}
        if form != "w4a8":
            for name, tile in tiles.items():
                variants[name] = lambda x, w, tile=tile: gpu_linear.launch_w8a8_prefill(
                    x, w, None, torch.bfloat16, tile
                )
        if form == "int8":
            variants["_int_mm, scaled after"] = lambda x, w: (
                torch._int_mm(x.codes, w.codes.t()).float().mul_(x.scale).mul_(w.scale).to(torch.bfloat16)
            )
            variants["_int_mm alone"] = lambda x, w: torch._int_mm(x.codes, w.codes.t())
        if form == "fp8":
            variants["_scaled_mm by row"] = lambda x, w: gpu_linear.scaled_mm(x, w, None)
        for variant, run in variants.items():

            def linears(layer=layer, inputs=inputs, run=run):
                for name, weight in layer.items():
                    run(inputs[LAYER[name][1]], weight)

            try:
                us = graph_us([linears], replays=7)
            except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
                print(f"{form} {variant}: {str(error).splitlines()[0]}")
                continue
            rate = f"{operations / us / 1e6:.0f} TOP/s"
            rows.append(Row(f"{form} layer, {num_tokens} tokens: {variant}", us, operations / rates["fp8"], rate))
    return rows


SHAPES = [(16, 8, 4), (32, 2, 4), (32, 4, 4), (32, 8, 4), (64, 4, 4), (64, 1, 4), (128, 1, 4)]
"""(columns, slots, warps) of decode tiles that are worth timing; one slot is for W4A8 alone."""


def sweep_tiles(form: str, batch: int) -> list[DecodeTiles]:
    """Decode tiles worth timing."""
    block_m = min(max(triton.next_power_of_2(batch), 8), 64)
    found = []
    for (block_n, slots, warps), stages, prefetch in itertools.product(SHAPES, (2, 3, 4, 6), (0, 8)):
        if form != "w4a8" and (slots == 1 or prefetch):
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
            decode(random_activation(batch, 4096, FORM[form]), random_weight(form, 4096, 4096), tiles)


def sweep(forms: Sequence[str], batches: Sequence[int], processes: int) -> list[dict[str, object]]:
    """From the launcher's tiles on, the best tiles of each matrix in turn, judged by the time of the whole layer."""
    jobs = [(form, batch, tiles) for form in forms for batch in batches for tiles in sweep_tiles(form, batch)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm, [jobs[i::processes] for i in range(processes)]))
    tried: list[dict[str, object]] = []
    for form in forms:
        layers = [{name: random_weight(form, *shape) for name, shape in LAYER.items()} for _ in range(4)]
        for batch in batches:
            inputs = {width: random_activation(batch, width, FORM[form]) for width in (HIDDEN, FEED_FORWARD)}
            best = {n: gpu_linear.decode_tiles(batch, *LAYER[n], w.codes.dtype) for n, w in layers[0].items()}

            def layer_us(tiles: dict[str, DecodeTiles], layers=layers, inputs=inputs) -> float:
                calls = [
                    partial(decode, inputs[LAYER[n][1]], w, tiles[n]) for layer in layers for n, w in layer.items()
                ]
                return graph_us(calls, replays=7) * len(LAYER)

            best_us = chosen_us = layer_us(best)
            for name in LAYER:
                for tiles in sweep_tiles(form, batch):
                    with suppress(triton.runtime.errors.OutOfResources):
                        us = layer_us(best | {name: tiles})
                        tried.append({"form": form, "batch": batch, "matrix": name, "us": us, **asdict(tiles)})
                        if us < best_us - 0.05:
                            best_us, best = us, best | {name: tiles}
            print(f"{form} batch {batch}: launcher's tiles {chosen_us:.2f} us, best {best_us:.2f} us", flush=True)
            for name, tiles in best.items():
                print(f"    {name}: {tiles}", flush=True)
    return tried


def main() -> None:
    """Prints one table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--sweep", nargs="*", metavar="FORMAT", help="try decode tiles of these formats first")
    parser.add_argument("--sweep-batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=8192, help="prompt tokens of the prefill rows")
    parser.add_argument("--processes", type=int, default=14, help="processes that compile for the sweep")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_linear needs a CUDA device")
    rates = ceilings()
    swept = sweep(options.sweep, options.sweep_batches, options.processes) if options.sweep else []
    rows = row_operations(rates["copy"], options.tokens)
    rows += decode_layers(rates["copy"], options.batches)
    rows += overlap_gain(rates["copy"], options.batches)
    rows += sampling(rates["copy"], options.batches)
    for num_tokens in (1024, options.tokens):
        rows += prefill_layers(rates, num_tokens)
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "copy_TB_s": rates["copy"] / 1e6,
        **{f"{name}_TOP_s": rates[name] / 1e6 for name in ("bf16", "fp8", "int8")},
    }
    print(about)
    print(f"{'operation':<56} {'us':>9} {'floor us':>9} {'fraction':>8}  of")
    for row in rows:
        print(f"{row.name:<56} {row.us:>9.2f} {row.floor_us:>9.2f} {row.fraction:>8.2f}  {row.what}")
    if options.json:
        listed = [{**asdict(row), "fraction": row.fraction} for row in rows]
        options.json.write_text(json.dumps({"about": about, "rows": listed, "sweep": swept}, indent=1))


if __name__ == "__main__":
    main()
