"""Sampling on a GPU without a sort: thresholds are found by a 16-way search over the bits of a distance.

A row's vocabulary is split over programs. `distance` is how far below the row's best logit a token lies, in units of
its temperature; non-negative floats order as their bits do, so seven passes of 16 thresholds find the last kept one
exactly. Each pass leaves, per program and threshold, the count (top_k) or mass (top_p) within it; every program of the
next pass adds them up, and so knows the bracket that is left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .overlap import after_previous, can_overlap, let_next_start

WAYS = tl.constexpr(16)
PASSES = tl.constexpr(7)
# distances up to 2^-25 count as none, their weight being 1 in float32; past 128 it is 0. Between lie 16^7 numbers
LOWEST = tl.constexpr((102 << 23) + 1)
HIGHEST = tl.constexpr(0x43000000)
INFINITE = tl.constexpr(0x7F800000)
BLOCK = tl.constexpr(1024)
# values compared with all thresholds at once: few registers on a card, few steps in the interpreter
SLICE = tl.constexpr(1024 if triton.knobs.runtime.interpret else 256)


@triton.jit
def _peak(peaks_ptr, row, PARTS: tl.constexpr):
    return tl.max(tl.load(peaks_ptr + row * PARTS + tl.arange(0, PARTS)))


@triton.jit
def _distance(logits_row, tokens, last, peak, heat):
    logits = tl.load(logits_row + tokens, mask=tokens < last, other=float("-inf"))
    return tl.div_rn(peak - logits, heat)


@triton.jit
def _bits(distance):
    return tl.maximum(distance.to(tl.int32, bitcast=True), LOWEST)


@triton.jit
def _span(low, high):
    """Width of each of the WAYS brackets between low (out) and high (in)."""
    return (high - low + WAYS - 1) // WAYS


@triton.jit
def _narrow(partials, low, high, need, PARTS: tl.constexpr):
    """The bracket in which the running count or mass first reaches need."""
    reached = tl.sum(tl.load(partials + tl.arange(0, PARTS)[:, None] * WAYS + tl.arange(0, WAYS)[None, :]), axis=0)
    way = tl.minimum(tl.sum((reached < need).to(tl.int32)), WAYS - 1)
    span = _span(low, high)
    return tl.minimum(low + way * span, high - 1), tl.minimum(low + (way + 1) * span, high)


@triton.jit
def peak_kernel(logits_ptr, peaks_ptr, logits_stride, vocab_size, part_size, PARTS: tl.constexpr, PDL: tl.constexpr):
    let_next_start(PDL)
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    first = part * part_size
    last = tl.minimum(first + part_size, vocab_size)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in tl.range(0, part_size, BLOCK):
        tokens = first + start + tl.arange(0, BLOCK)
        best = tl.maximum(
            best, tl.load(logits_ptr + row * logits_stride + tokens, mask=tokens < last, other=float("-inf"))
        )
    tl.store(peaks_ptr + row * PARTS + part, tl.max(best))


@triton.jit(do_not_specialize=["step"])
def search_kernel(
    logits_ptr, peaks_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    partials_ptr, brackets_ptr, totals_ptr, limits_ptr, logits_stride, vocab_size, part_size, num_rows, step,
    greedy_below, MASS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pass `step` of a search. Step PASSES only writes the row's limit, as bits of a distance.

    partials: float64 [PASSES, N, PARTS, WAYS]; brackets: int32 [PASSES, N, 2]; totals: float64 [N]; limits: int32
    [2, N], the limit that counts (0) and mass (1) found.
    """
    let_next_start(PDL)
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if MASS:
        top_p = tl.load(top_p_ptr + row)
        active = top_p < 1
        min_p = tl.load(min_p_ptr + row)
        limit = tl.where(min_p > 0, _bits(-tl.log(tl.maximum(min_p, 1e-30))), INFINITE)
        limit = tl.minimum(limit, tl.load(limits_ptr + row))
        need = top_p.to(tl.float64)
    else:
        top_k = tl.load(top_k_ptr + row)
        active = top_k > 0
        limit = tl.full((), INFINITE, tl.int32)
        need = top_k.to(tl.float64)
    heat = tl.load(temperature_ptr + row)
    if active & (heat >= greedy_below):
        low = tl.full((), LOWEST - 1, tl.int32)
        high = tl.full((), HIGHEST, tl.int32)
        if step > 0:
            before = ((step - 1) * num_rows + row) * 2
            low = tl.load(brackets_ptr + before)
            high = tl.load(brackets_ptr + before + 1)
            partials = partials_ptr + ((step - 1) * num_rows + row) * (PARTS * WAYS)
            if MASS:
                if step == 1:
                    total = tl.sum(tl.load(partials + tl.arange(0, PARTS) * WAYS + WAYS - 1))
                    if part == 0:
                        tl.store(totals_ptr + row, total)
                else:
                    total = tl.load(totals_ptr + row)
                need = need * total
            low, high = _narrow(partials, low, high, need, PARTS)
        if part == 0:
            if step == PASSES:
                # nothing past HIGHEST weighs anything, so a search that ends there keeps all
                tl.store(
                    limits_ptr + MASS * num_rows + row, tl.minimum(tl.where(high >= HIGHEST, INFINITE, high), limit)
                )
            else:
                tl.store(brackets_ptr + (step * num_rows + row) * 2, low)
                tl.store(brackets_ptr + (step * num_rows + row) * 2 + 1, high)
        if step < PASSES:
            peak = _peak(peaks_ptr, row, PARTS)
            ways = tl.arange(0, WAYS)
            thresholds = tl.minimum(low + (ways + 1) * _span(low, high), high)
            within = tl.zeros((WAYS, SLICE), tl.float32)
            first = part * part_size
            last = tl.minimum(first + part_size, vocab_size)
            for start in tl.range(0, part_size, SLICE):
                tokens = first + start + tl.arange(0, SLICE)
                distance = _distance(logits_ptr + row * logits_stride, tokens, last, peak, heat)
                bits = _bits(distance)
                weight = tl.where((bits <= limit) & (tokens < last), tl.exp(-distance) if MASS else 1.0, 0.0)
                within += tl.where(bits[None, :] <= thresholds[:, None], weight[None, :], 0.0)
            reached = tl.sum(within.to(tl.float64), axis=1)
            tl.store(partials_ptr + ((step * num_rows + row) * PARTS + part) * WAYS + ways, reached)
    else:
        if (step == PASSES) & (part == 0):
            tl.store(limits_ptr + MASS * num_rows + row, limit)


@triton.jit
def _limit(limits_ptr, min_p_ptr, row, num_rows, FILTERED: tl.constexpr):
    if FILTERED:
        return tl.load(limits_ptr + num_rows + row)
    else:
        min_p = tl.load(min_p_ptr + row)
        return tl.where(min_p > 0, _bits(-tl.log(tl.maximum(min_p, 1e-30))), INFINITE)


@triton.jit
def _weights(logits_row, tokens, last, peak, heat, limit):
    distance = _distance(logits_row, tokens, last, peak, heat)
    return tl.where((_bits(distance) <= limit) & (tokens < last), tl.exp(-distance), 0.0).to(tl.float64)


@triton.jit
def mass_kernel(
    logits_ptr, peaks_ptr, temperature_ptr, min_p_ptr, limits_ptr, masses_ptr,
    logits_stride, vocab_size, part_size, num_rows, greedy_below,
    FILTERED: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """masses: float64 [N, PARTS], the kept weight of each part of the vocabulary."""
    let_next_start(PDL)
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    peak = _peak(peaks_ptr, row, PARTS)
    # a greedy row draws nothing; any divisor will do
    heat = tl.load(temperature_ptr + row)
    heat = tl.where(heat < greedy_below, 1.0, heat)
    limit = _limit(limits_ptr, min_p_ptr, row, num_rows, FILTERED)
    first = part * part_size
    last = tl.minimum(first + part_size, vocab_size)
    mass = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, part_size, BLOCK):
        tokens = first + start + tl.arange(0, BLOCK)
        mass += _weights(logits_ptr + row * logits_stride, tokens, last, peak, heat, limit)
    tl.store(masses_ptr + row * PARTS + part, tl.sum(mass))


@triton.jit
def draw_kernel(
    logits_ptr, peaks_ptr, temperature_ptr, min_p_ptr, uniform_ptr, limits_ptr, masses_ptr, out_ptr,
    logits_stride, vocab_size, part_size, num_rows, greedy_below,
    FILTERED: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Finds the part that holds the drawn number, then the token in it: the first whose running mass exceeds it."""
    let_next_start(PDL)
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    peaks = tl.load(peaks_ptr + row * PARTS + parts)
    peak = tl.max(peaks)
    heat = tl.load(temperature_ptr + row)
    limit = _limit(limits_ptr, min_p_ptr, row, num_rows, FILTERED)
    logits_row = logits_ptr + row * logits_stride
    found = vocab_size
    if heat < greedy_below:
        part = tl.min(tl.where(peaks == peak, parts, PARTS))
        first = part * part_size
        last = tl.minimum(first + part_size, vocab_size)
        for start in tl.range(0, part_size, BLOCK):
            tokens = first + start + tl.arange(0, BLOCK)
            logits = tl.load(logits_row + tokens, mask=tokens < last, other=float("-inf"))
            found = tl.minimum(found, tl.min(tl.where((logits == peak) & (tokens < last), tokens, vocab_size)))
    else:
        masses = tl.load(masses_ptr + row * PARTS + parts)
        target = tl.load(uniform_ptr + row) * tl.sum(masses)
        # parts that end at or below the target are behind it; the last one with any mass is as far as it goes
        running = tl.cumsum(masses, 0)
        part = tl.sum((running <= target).to(tl.int32))
        part = tl.minimum(part, tl.max(tl.where(masses > 0, parts, 0)))
        target = target - tl.sum(tl.where(parts < part, masses, 0.0))
        first = part * part_size
        last = tl.minimum(first + part_size, vocab_size)
        behind = tl.zeros((), tl.float64)
        furthest = 0
        for start in tl.range(0, part_size, BLOCK):
            tokens = first + start + tl.arange(0, BLOCK)
            weights = _weights(logits_row, tokens, last, peak, heat, limit)
            over = (behind + tl.cumsum(weights, 0) > target) & (weights > 0)
            found = tl.minimum(found, tl.min(tl.where(over, tokens, vocab_size)))
            furthest = tl.maximum(furthest, tl.max(tl.where(weights > 0, tokens, 0)))
            behind += tl.sum(weights)
        # rounding may leave the target at the part's very end
        found = tl.where(found == vocab_size, furthest, found)
    tl.store(out_ptr + row, tl.minimum(found, vocab_size - 1).to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    filtered: bool = True,
) -> Tensor:
    """See lserve.kernels.sample.sample."""
    from ..sample import GREEDY_BELOW

    num_rows, vocab_size = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    device = logits.device
    out = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return out
    overlap = can_overlap(device)
    parts = min(64, triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK.value)))
    part_size = triton.cdiv(triton.cdiv(vocab_size, parts), BLOCK.value) * BLOCK.value
    launch = {"PARTS": parts, "PDL": overlap, "launch_pdl": overlap, "num_warps": 4}
    grid = (num_rows, parts)
    shape = (logits.stride(0), vocab_size, part_size)
    peaks = torch.empty((num_rows, parts), dtype=torch.float32, device=device)
    masses = torch.empty((num_rows, parts), dtype=torch.float64, device=device)
    limits = torch.empty((2, num_rows), dtype=torch.int32, device=device)
    peak_kernel[grid](logits, peaks, *shape, **launch)
    if filtered:
        partials = torch.empty((PASSES.value, num_rows, parts, WAYS.value), dtype=torch.float64, device=device)
        brackets = torch.empty((PASSES.value, num_rows, 2), dtype=torch.int32, device=device)
        totals = torch.empty(num_rows, dtype=torch.float64, device=device)
        for mass in (False, True):
            for step in range(PASSES.value + 1):
                search_kernel[grid](
                    logits, peaks, temperature, top_k, top_p, min_p, partials, brackets, totals, limits,
                    *shape, num_rows, step, GREEDY_BELOW, MASS=mass, **launch,
                )  # fmt: skip
    mass_kernel[grid](
        logits,
        peaks,
        temperature,
        min_p,
        limits,
        masses,
        *shape,
        num_rows,
        GREEDY_BELOW,
        FILTERED=filtered,
        **launch,
    )
    draw_kernel[(num_rows,)](
        logits, peaks, temperature, min_p, uniform, limits, masses, out, *shape, num_rows, GREEDY_BELOW,
        FILTERED=filtered, **launch,
    )  # fmt: skip
    return out
