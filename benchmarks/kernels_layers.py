"""Sections of `bench_kernels.py`: linear layers, norms, RoPE, SiLU and sampling, one layer of an 8B model's shape.

Low-bit decode layers are judged by the bytes of their weights over the copy bandwidth, many tokens by the rate of
torch's fp8 product in the same run.
"""

from collections.abc import Callable
from functools import partial

import torch
from kernel_timing import Ceilings, Row, graph_us

from lserve.kernels.activation import silu_mul, silu_mul_quantize
from lserve.kernels.activation_format import QuantizedActivation, quantize_activation
from lserve.kernels.gpu.linear import PrefillTiles, launch_w8a8_prefill, scaled_mm
from lserve.kernels.linear import linear_w4a8, linear_w8a8
from lserve.kernels.norm import add_rms_norm, add_rms_norm_quantize, rms_norm_quantize
from lserve.kernels.rope import rope
from lserve.kernels.sample import sample
from lserve.kernels.weight_format import CHUNK, W4Weight, W8Weight

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
FORM = {"w4a8": "int8_sums", "int8": "int8", "fp8": "fp8"}
BATCHES = (1, 16, 64)
Weight = W4Weight | W8Weight | torch.Tensor


def random_weight(form: str, num_columns: int, num_channels: int) -> Weight:
    """Random codes of a format; levels keep what they decode to within int8."""
    scale = torch.rand(num_columns, device="cuda") * 1e-3 + 1e-4
    if form == "bf16":
        return torch.randn(num_columns, num_channels, device="cuda", dtype=torch.bfloat16)
    if form == "w4a8":
        chunks = -(-num_channels // CHUNK)
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


def random_layers(form: str) -> list[dict[str, Weight]]:
    """Several layers' weights, so that no cache helps."""
    return [{name: random_weight(form, *shape) for name, shape in LAYER.items()} for _ in range(4)]


def random_activation(num_tokens: int, num_channels: int, form: str) -> QuantizedActivation:
    """Random tokens, quantized."""
    return quantize_activation(torch.randn(num_tokens, num_channels, device="cuda", dtype=torch.bfloat16), form)


def apply(x: QuantizedActivation | torch.Tensor, weight: Weight) -> torch.Tensor:
    """The product that a layer in weight's format computes."""
    if isinstance(weight, torch.Tensor):
        return torch.nn.functional.linear(x, weight)
    return (linear_w4a8 if isinstance(weight, W4Weight) else linear_w8a8)(x, weight, None, torch.bfloat16)


def _by_bytes(section: str, case: str, us: float, num_bytes: int, ceilings: Ceilings, at_least: float = 0) -> Row:
    fraction = num_bytes / ceilings.copy * 1e6 / us
    bar = f">= {at_least:.2f} of bandwidth" if at_least else ""
    return Row(section, case, us, "bytes", fraction, bar, fraction >= at_least if at_least else None)


def row_operations(ceilings: Ceilings, num_tokens: int = 8192) -> list[Row]:
    """Norms, RoPE and SiLU, by bytes."""
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    count, t, h, f = 4, num_tokens, HIDDEN, FEED_FORWARD
    x, residual = torch.randn(2, count, t, h, **bf16)
    gate_up = torch.randn(count, t, 2 * f, **bf16)
    qkv = torch.randn(count, t, HEADS + 2 * KV_HEADS, HEAD_DIM, **bf16)
    weight = torch.randn(h, **bf16)
    cos, sin = torch.rand(2, t, HEAD_DIM, device="cuda")
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
    return [
        _by_bytes("row_operations", name, graph_us([partial(call, i) for i in range(count)]), size, ceilings, 0.75)
        for name, call, size in cases
    ]


def decode_layers(ceilings: Ceilings) -> list[Row]:
    """A layer's four linears in one graph, alone and with the norms, SiLU and quantization around them."""
    rows = []
    for form in ("w4a8", "int8", "fp8", "bf16"):
        layers = random_layers(form)
        num_bytes = sum(map(weight_bytes, layers[0].values()))
        for batch in BATCHES:
            inputs = {
                width: torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
                if form == "bf16"
                else random_activation(batch, width, FORM[form])
                for width in (HIDDEN, FEED_FORWARD)
            }
            calls = [partial(apply, inputs[LAYER[n][1]], w) for layer in layers for n, w in layer.items()]
            at_least = 0.6 if form == "w4a8" and batch <= 16 else 0
            us = graph_us(calls) * len(LAYER)
            rows.append(_by_bytes("decode_layers", f"{form} linears, batch {batch}", us, num_bytes, ceilings, at_least))
            if form != "bf16":
                us = graph_us(_whole_layers(layers, batch, FORM[form]))
                case = f"{form} linears, norms, batch {batch}"
                rows.append(_by_bytes("decode_layers", case, us, num_bytes, ceilings))
        del layers
    return rows


def _whole_layers(layers: list[dict[str, Weight]], batch: int, form: str) -> list[Callable[[], object]]:
    x, residual, attended = torch.randn(3, batch, HIDDEN, device="cuda", dtype=torch.bfloat16)
    norm = torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16)

    def whole(layer: dict[str, Weight]) -> None:
        normed, total = add_rms_norm_quantize(x, residual, norm, 1e-5, form)
        apply(normed, layer["qkv"])
        delta = apply(quantize_activation(attended, form), layer["o"])
        normed, total = add_rms_norm_quantize(delta, total, norm, 1e-5, form)
        apply(silu_mul_quantize(apply(normed, layer["gate_up"]), form), layer["down"])

    return [partial(whole, layer) for layer in layers]


def sampling(ceilings: Ceilings) -> list[Row]:
    """Draws from 128,256 logits; the floor reads them once."""
    rows = []
    for batch in BATCHES:
        logits = torch.randn(batch, 128256, device="cuda") * 2
        ones = torch.ones(batch, device="cuda")
        numbers = torch.rand(batch, device="cuda", dtype=torch.float64)
        for name, heat, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("plain", 0.8, 0, 1.0),
            ("top_k 50, top_p 0.9", 0.8, 50, 0.9),
        ):
            arguments = (logits, ones * heat, ones.int() * top_k, ones * top_p, ones * 0, numbers)
            us = graph_us([partial(sample, *arguments, filtered=top_p < 1)] * 4)
            rows.append(_by_bytes("sampling", f"{name}, batch {batch}", us, logits.nbytes, ceilings))
    return rows


def prefill_layers(_: Ceilings, num_tokens: int = 8192) -> list[Row]:
    """A layer's four linears for many tokens, and what else could have computed them."""
    operations = sum(2 * num_tokens * n * k for n, k in LAYER.values())
    rate = _fp8_rate()
    rows = []
    for form in ("w4a8", "int8", "fp8"):
        layer = {name: random_weight(form, *shape) for name, shape in LAYER.items()}
        inputs = {width: random_activation(num_tokens, width, FORM[form]) for width in (HIDDEN, FEED_FORWARD)}
        variants: dict[str, Callable[[QuantizedActivation, Weight], object]] = {"": apply}
        if form != "w4a8":
            variants[", our tiles"] = lambda x, w: launch_w8a8_prefill(
                x, w, None, torch.bfloat16, PrefillTiles(128, 128, 128, 8, 4, 3)
            )
        if form == "int8":
            variants[", _int_mm alone"] = lambda x, w: torch._int_mm(x.codes, w.codes.t())
        if form == "fp8":
            variants[", _scaled_mm by row"] = lambda x, w: scaled_mm(x, w, None)
        for name, run in variants.items():
            calls = [partial(run, inputs[LAYER[n][1]], w) for n, w in layer.items()]
            us = graph_us(calls, repeats=7) * len(LAYER)
            fraction = operations / rate * 1e6 / us
            bar = "" if name else ">= 0.70 of the fp8 rate"
            met = None if name else fraction >= 0.7
            rows.append(Row("prefill_layers", f"{form}, {num_tokens} tokens{name}", us, "fp8 rate", fraction, bar, met))
    return rows


def _fp8_rate() -> float:
    """Operations per second of torch's fp8 product, 8192-cubed."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    multiply = partial(
        torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return 2 * 8192**3 / graph_us([multiply] * 2) * 1e6


SECTIONS = {
    "row_operations": row_operations,
    "decode_layers": decode_layers,
    "sampling": sampling,
    "prefill_layers": prefill_layers,
}
