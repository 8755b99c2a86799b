"""Triton kernels of `page_select`: bounds, candidates, masses, choice. Each exits at once where no sequence chooses
in this step.

Each kernel may start while the one ahead still runs (see `overlap.py`) and reads what that one wrote after
`after_previous`. Only the first, the bounds, waits before anything else; the others' batch and query are then safe to
read from their start.
"""

import torch
import triton
import triton.language as tl

from ..views import DecodeBatch, LayerView, Selection
from .codec import INTERPRETED, dequantize, load_codes, load_halves, math_dtype, pool_views
from .overlap import after_previous, can_overlap, let_next_start
from .top_pages import keys_of, take
from .work import (
    candidate_bound,
    chooses,
    first_window_page,
    num_programs,
    pick,
    run_start,
    runs,
    sealed_pages,
    sequence_of,
)

if not INTERPRETED:
    from . import packed, select_packed

BOUND_PROGRAMS = 4
BOUND_STAGES = 4
BOUND_WARPS = 2
PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_UNITS = 2
LOG2_E = 1.4426950408889634


@triton.jit
def _load_sequences(positions, budgets, reselects, num_batch, BLOCK_B: tl.constexpr, P: tl.constexpr):
    b = tl.arange(0, BLOCK_B)
    position = tl.load(positions + b, mask=b < num_batch, other=0).to(tl.int32)
    budget = tl.load(budgets + b, mask=b < num_batch, other=1)
    reselect = tl.load(reselects + b, mask=b < num_batch, other=0)
    return position, budget, (b < num_batch) & chooses(position, budget, reselect, P)


@triton.jit
def _bounds_kernel(
    query, bounds, pool_half, retrieval_heads, positions, budgets, reselects, retrieval_table,
    num_batch, scale, query_stride_b, query_stride_h, page_stride, slot_stride, table_stride, bounds_stride,
    RETRIEVAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    P: tl.constexpr, GROUPS: tl.constexpr, HALF_LEVELS: tl.constexpr, KEY_MIN: tl.constexpr, KEY_STEP: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, PAGES: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First stage: bounds float32 [B, R, pages] of every sealed page, always-kept ones too. Tiles of PAGES pages of all
    sequences and heads are cut into equal runs, read STAGES - 1 ahead.
    """
    after_previous(PDL)
    let_next_start(PDL)
    position, budget, chosen = _load_sequences(positions, budgets, reselects, num_batch, BLOCK_B, P)
    ends = tl.cumsum(tl.where(chosen, tl.cdiv(sealed_pages(position, P), PAGES) * RETRIEVAL, 0), 0)
    total = tl.max(ends, 0)
    num_runs = runs(total, tl.num_programs(0), 1)
    unit = run_start(tl.program_id(0), total, num_runs)
    last = run_start(tl.program_id(0) + 1, total, num_runs)
    lines = tl.arange(0, BLOCK_B)
    g = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    r = tl.arange(0, PAGES * GROUPS)
    in_query = (g < GROUP)[:, None] & (columns < D)[None, :]
    while unit < last:
        b, first = sequence_of(ends, unit)
        sealed = sealed_pages(pick(position, lines, b), P)
        tiles = tl.cdiv(sealed, PAGES)
        order = (unit - first) // tiles
        start = (unit - first) % tiles
        stop = tl.minimum(start + last - unit, tiles)
        unit += stop - start
        head = tl.load(retrieval_heads + order).to(tl.int32)
        slot = tl.multiple_of(order.to(tl.int64) * slot_stride, 16)
        table = retrieval_table + b.to(tl.int64) * table_stride
        q_pointers = (
            query + b.to(tl.int64) * query_stride_b + (head * GROUP + g)[:, None] * query_stride_h + columns[None, :]
        )
        q = tl.load(q_pointers, mask=in_query, other=0).to(DTYPE)
        reach = q + tl.abs(q)
        target = bounds + (b * RETRIEVAL + order).to(tl.int64) * bounds_stride
        for tile in tl.range(start, stop, num_stages=STAGES):
            page = tl.minimum(tile * PAGES + r // GROUPS, sealed - 1)
            page_id = tl.load(table + page).to(tl.int64)
            at = tl.multiple_of((page_id * page_stride + slot) // 2 + r % GROUPS * D, 8)[:, None] + columns[None, :]
            mask = (columns < D)[None, :] & (r >= 0)[:, None]
            minimum = tl.load(pool_half + at + KEY_MIN // 2, mask=mask, other=0).to(DTYPE)
            step = tl.load(pool_half + at + KEY_STEP // 2, mask=mask, other=0).to(DTYPE)
            # q . centre + |q| . radius, with centre = minimum + radius, and q + |q| exact in any float format
            score = tl.dot(q, tl.trans(minimum), input_precision="ieee")
            score += tl.dot(reach, tl.trans(step), input_precision="ieee") * HALF_LEVELS
            score = tl.max(tl.where((g < GROUP)[:, None], score * scale, float("-inf")), 0)
            if GROUPS > 1:
                score = tl.max(tl.reshape(score, (PAGES, GROUPS)), 1)
            listed = tile * PAGES + tl.arange(0, PAGES)
            tl.store(target + listed, score, mask=listed < sealed)


@triton.jit
def _candidates_kernel(
    bounds, pages_out, counts_out, rows, retrieval_heads, positions, budgets, reselects,
    factor, sink_size, window, bounds_stride, pages_stride_r, pages_stride_h, counts_stride_r, width,
    RETRIEVAL: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, FINAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best pages by their bounds and the always-kept ones, ascending: candidates, or with FINAL the choice
    itself.
    """
    b = (tl.program_id(0) // RETRIEVAL).to(tl.int64)
    order = tl.program_id(0) % RETRIEVAL
    position = tl.load(positions + b)
    budget = tl.load(budgets + b)
    choosing = chooses(position, budget, tl.load(reselects + b), P)
    sealed = sealed_pages(position, P)
    page = tl.arange(0, BLOCK)
    sink_pages = (sink_size + P - 1) // P
    real = page < sealed
    kept = real & ((page < sink_pages) | (page >= first_window_page(position, window, P)))
    if FINAL:
        count = budget - 1
        row = tl.load(rows + b).to(tl.int64)
        head = tl.load(retrieval_heads + order)
    else:
        count = factor * budget + tl.sum(kept.to(tl.int32), 0)
        row = b
        head = order.to(tl.int64)
    after_previous(PDL)
    let_next_start(PDL)
    if choosing:
        score = tl.load(bounds + tl.program_id(0).to(tl.int64) * bounds_stride + page, mask=real, other=0.0)
        taken, place, total = take(keys_of(score, kept, real), count)
        target = row * pages_stride_r + head * pages_stride_h
        tl.store(pages_out + target + place, page, mask=taken & (place < width))
        tl.store(counts_out + row * counts_stride_r + head, total)


@triton.jit
def _masses_kernel(
    query, masses, pool_codes, pool_half, retrieval_heads, rows_of, positions, budgets, reselects,
    retrieval_table, candidates, candidate_counts, tail_key,
    num_batch, scale, factor, sink_size, window, query_stride_b, query_stride_h, page_stride, slot_stride,
    table_stride, width,
    tk_stride_r, tk_stride_h, tk_stride_t,
    RETRIEVAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF: tl.constexpr, LOGICAL: tl.constexpr, KEY_BITS: tl.constexpr, KEY_MIN: tl.constexpr, KEY_STEP: tl.constexpr,
    DTYPE: tl.constexpr, TAIL_DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, MIN_UNITS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Second stage: base-2 log-sum-exp of every listed page's scores, float32 [B, R, group_size, width + 1]; the own
    page's is last.
    """
    P: tl.constexpr = 2 * HALF
    UNIT: tl.constexpr = 8 if KEY_BITS < 16 else KEY_BITS
    every_position, every_budget, chosen = _load_sequences(positions, budgets, reselects, num_batch, BLOCK_B, P)
    sink_pages = (sink_size + P - 1) // P
    ends = (candidate_bound(every_position, every_budget, factor, sink_pages, window, P) + 1) * RETRIEVAL
    ends = tl.cumsum(tl.where(chosen, ends, 0), 0)
    total = tl.max(ends, 0)
    num_runs = runs(total, tl.num_programs(0), MIN_UNITS)
    unit = run_start(tl.program_id(0), total, num_runs)
    last = run_start(tl.program_id(0) + 1, total, num_runs)
    lines = tl.arange(0, BLOCK_B)
    g = tl.arange(0, BLOCK_G)
    rows = tl.arange(0, HALF)
    columns = tl.arange(0, BLOCK_D)
    in_query = (g < GROUP)[:, None] & (columns < D)[None, :]
    after_previous(PDL)
    let_next_start(PDL)
    while unit < last:
        b, first = sequence_of(ends, unit)
        position = pick(every_position, lines, b)
        length = candidate_bound(position, pick(every_budget, lines, b), factor, sink_pages, window, P)
        order = (unit - first) // (length + 1)
        start = (unit - first) % (length + 1)
        stop = tl.minimum(start + last - unit, length + 1)
        unit += stop - start
        head = tl.load(retrieval_heads + order).to(tl.int32)
        slot = tl.multiple_of(order.to(tl.int64) * slot_stride, 16)
        pair = (b * RETRIEVAL + order).to(tl.int64)
        last_page = tl.minimum(stop, tl.load(candidate_counts + pair))
        q_pointers = (
            query + b.to(tl.int64) * query_stride_b + (head * GROUP + g)[:, None] * query_stride_h + columns[None, :]
        )
        q_raw = tl.load(q_pointers, mask=in_query, other=0)
        q = q_raw.to(DTYPE)
        target = masses + (pair * GROUP + g) * (width + 1)
        table = retrieval_table + b.to(tl.int64) * table_stride
        for j in range(start, last_page):
            page_id = tl.load(table + tl.load(candidates + pair * width + j)).to(tl.int64)
            at = tl.multiple_of(page_id * page_stride, 16) + slot
            k0 = load_codes(pool_codes, at * 8 // UNIT, D, rows, columns, D, True)
            k1 = k0 if KEY_BITS == 4 else load_codes(pool_codes, at * 8 // UNIT + HALF * D, D, rows, columns, D, True)
            ks0, km0, ks1, km1 = 0.0, 0.0, 0.0, 0.0
            if KEY_BITS < 16:
                ks0 = load_halves(pool_half, at // 2 + KEY_STEP // 2, columns, D, LOGICAL, HALF, 0, True)
                km0 = load_halves(pool_half, at // 2 + KEY_MIN // 2, columns, D, LOGICAL, HALF, 0, True)
                ks1 = load_halves(pool_half, at // 2 + KEY_STEP // 2, columns, D, LOGICAL, HALF, 1, True)
                km1 = load_halves(pool_half, at // 2 + KEY_MIN // 2, columns, D, LOGICAL, HALF, 1, True)
            low, high = dequantize(k0, k1, ks0, km0, ks1, km1, KEY_BITS, DTYPE, ASM, True)
            s_low = tl.dot(q, tl.trans(low), input_precision="ieee") * scale
            s_high = tl.dot(q, tl.trans(high), input_precision="ieee") * scale
            highest = tl.max(tl.maximum(s_low, s_high), 1)
            weight = tl.sum(tl.exp2(s_low - highest[:, None]) + tl.exp2(s_high - highest[:, None]), 1)
            tl.store(target + j, highest + tl.log2(weight), mask=g < GROUP)
        if stop > length:
            row = tl.load(rows_of + b).to(tl.int64)
            token = tl.arange(0, P)
            seen = token <= position % P
            key = tl.load(
                tail_key + row * tk_stride_r + head * tk_stride_h + token.to(tl.int64)[:,
                None] * tk_stride_t + columns[None, :],
                mask=seen[:, None] & (columns < D)[None, :], other=0,
            )  # fmt: skip
            s = tl.dot(q_raw.to(TAIL_DTYPE), tl.trans(key.to(TAIL_DTYPE)), input_precision="ieee") * scale
            s = tl.where(seen[None, :], s, float("-inf"))
            highest = tl.max(s, 1)
            weight = tl.sum(tl.exp2(s - highest[:, None]), 1)
            tl.store(target + width, highest + tl.log2(weight), mask=g < GROUP)


@triton.jit
def _choice_kernel(
    masses, candidates, candidate_counts, chosen, chosen_counts, rows, retrieval_heads, positions, budgets, reselects,
    sink_size, window, width, chosen_stride_r, chosen_stride_h, counts_stride_r, chosen_width,
    RETRIEVAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Softmax of the masses per query head, mean over the group, the best pages within the budget, ascending."""
    pair = tl.program_id(0).to(tl.int64)
    b = pair // RETRIEVAL
    position = tl.load(positions + b)
    budget = tl.load(budgets + b)
    choosing = chooses(position, budget, tl.load(reselects + b), P)
    row = tl.load(rows + b).to(tl.int64)
    head = tl.load(retrieval_heads + pair % RETRIEVAL)
    j = tl.arange(0, BLOCK)
    real = choosing & (j < tl.load(candidate_counts + pair))
    page = tl.load(candidates + pair * width + j, mask=real, other=0)
    sink_pages = (sink_size + P - 1) // P
    kept = real & ((page < sink_pages) | (page >= first_window_page(position, window, P)))
    after_previous(PDL)
    let_next_start(PDL)
    if choosing:
        member = tl.arange(0, BLOCK_G)
        source = masses + (pair * GROUP + member) * (width + 1)
        in_group = member < GROUP
        mass = tl.load(source[:, None] + j[None, :], mask=in_group[:, None] & real[None, :], other=float("-inf"))
        own = tl.load(source + width, mask=in_group, other=0.0)
        highest = tl.maximum(tl.max(mass, 1), own)
        weight = tl.exp2(mass - highest[:, None])
        scale = 1.0 / ((tl.sum(weight, 1) + tl.exp2(own - highest)) * GROUP)
        share = tl.sum(weight * scale[:, None], 0)
        taken, place, total = take(keys_of(share, kept, real), budget - 1)
        target = chosen + row * chosen_stride_r + head * chosen_stride_h
        tl.store(target + place, page, mask=taken & (place < chosen_width))
        tl.store(chosen_counts + row * counts_stride_r + head, total)


def _warps(block: int) -> int:
    """Warps for a row of `block` scores: few, for each pass has a barrier."""
    return min(max(block // 512, 2), 16)


def page_select(
    query: torch.Tensor,
    layer: LayerView,
    batch: DecodeBatch,
    selection: Selection,
    candidate_factor: int,
    two_stage: bool,
) -> None:
    """See `kernels.page_select.page_select`. Scratch comes from torch's allocator, which a CUDA graph captures as
    well.
    """
    num_batch, num_query_heads, head_dim = query.shape
    num_retrieval = layer.retrieval_heads.numel()
    if not num_batch or not num_retrieval:
        return
    layout = layer.layout
    group = num_query_heads // layer.head_slots.numel()
    device = query.device
    max_pages, sink_size, window = batch.max_pages, layer.sink_size, layer.local_window
    block_b, block_d = triton.next_power_of_2(num_batch), triton.next_power_of_2(head_dim)
    block_g = max(16, triton.next_power_of_2(group))
    pairs = num_batch * num_retrieval
    codes, half = pool_views(layer.retrieval_pool[:, layer.first_retrieval_slot :], layout)
    sequences = (batch.positions, batch.budget_pages, batch.reselect)
    chosen_strides = (selection.pages.stride(0), selection.pages.stride(1), selection.counts.stride(0))
    overlap = can_overlap(device)
    launch = {"PDL": overlap, "launch_pdl": overlap}
    bounds = torch.empty(pairs, max_pages, dtype=torch.float32, device=device)
    pages = min(max(8192 // (layout.num_groups * block_d), 16), 32)
    tiles = pairs * triton.cdiv(max_pages, pages)
    scale = layer.scale * LOG2_E
    _bounds_kernel[(min(tiles, num_programs(query, BOUND_PROGRAMS)),)](
        query, bounds, half, layer.retrieval_heads, *sequences, batch.retrieval_table,
        num_batch, layer.scale, *query.stride()[:2], layer.retrieval_pool.stride(0), layout.slot_bytes,
        batch.retrieval_table.stride(0), max_pages,
        RETRIEVAL=num_retrieval, GROUP=group, BLOCK_G=block_g, D=head_dim, BLOCK_D=block_d,
        P=layout.page_size, GROUPS=layout.num_groups, HALF_LEVELS=layout.key_levels / 2,
        KEY_MIN=layout.key_min, KEY_STEP=layout.key_step,
        DTYPE=tl.float32 if query.dtype == torch.float32 else tl.float16, BLOCK_B=block_b, PAGES=pages,
        STAGES=BOUND_STAGES, num_warps=BOUND_WARPS, **launch,
    )  # fmt: skip
    block = max(triton.next_power_of_2(max_pages), 16)
    if two_stage:
        always = triton.cdiv(sink_size, layout.page_size) + triton.cdiv(window, layout.page_size) + 1
        width = min(max_pages, candidate_factor * (selection.pages.shape[2] + 1) + always)
        pages_out = torch.empty(num_batch, num_retrieval, width, dtype=torch.int32, device=device)
        counts_out = torch.empty(num_batch, num_retrieval, dtype=torch.int32, device=device)
        strides = (pages_out.stride(0), pages_out.stride(1), counts_out.stride(0))
    else:
        width = selection.pages.shape[2]
        pages_out, counts_out, strides = selection.pages, selection.counts, chosen_strides
    _candidates_kernel[(pairs,)](
        bounds, pages_out, counts_out, batch.rows, layer.retrieval_heads, *sequences,
        candidate_factor, sink_size, window, max_pages, *strides, width,
        RETRIEVAL=num_retrieval, P=layout.page_size, BLOCK=block, FINAL=not two_stage, num_warps=_warps(block),
        **launch,
    )  # fmt: skip
    if not two_stage:
        return
    masses = torch.empty(pairs, group, width + 1, dtype=torch.float32, device=device)
    arguments = (
        layer.retrieval_heads, batch.rows, *sequences,
        batch.retrieval_table, pages_out, counts_out, layer.tail_key,
        num_batch, scale, candidate_factor, sink_size, window, *query.stride()[:2],
        layer.retrieval_pool.stride(0), layout.slot_bytes, batch.retrieval_table.stride(0), width,
        *layer.tail_key.stride()[:3],
    )  # fmt: skip
    common = {
        "RETRIEVAL": num_retrieval, "GROUP": group, "D": head_dim, "LOGICAL": layout.logical_page_size,
        "KEY_BITS": layout.key_bits, "KEY_MIN": layout.key_min, "BLOCK_B": block_b, "MIN_UNITS": MIN_UNITS, **launch,
    }  # fmt: skip
    if not INTERPRETED and packed.supports(layout, query, layer.tail_key, group):
        ring = layout.value_codes * select_packed.STAGES
        programs = num_programs(query, packed.programs_per_multiprocessor(ring, select_packed.PROGRAMS))
        select_packed.launch(programs, query, masses, codes, *arguments, N=8 if group <= 8 else 16, **common)
    else:
        tail_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(query.dtype, tl.float32)
        _masses_kernel[(num_programs(query, PROGRAMS_PER_MULTIPROCESSOR),)](
            query, masses, codes, half, *arguments,
            BLOCK_G=block_g, BLOCK_D=block_d, HALF=layout.page_size // 2, KEY_STEP=layout.key_step,
            DTYPE=math_dtype(layout, query.dtype), TAIL_DTYPE=tail_dtype, ASM=not INTERPRETED,
            num_warps=8 if block_d >= 256 else 4, **common,
        )  # fmt: skip
    block = max(triton.next_power_of_2(width), 16)
    _choice_kernel[(pairs,)](
        masses, pages_out, counts_out, selection.pages, selection.counts, batch.rows, layer.retrieval_heads, *sequences,
        sink_size, window, width, *chosen_strides, selection.pages.shape[2],
        RETRIEVAL=num_retrieval, GROUP=group, BLOCK_G=triton.next_power_of_2(group), P=layout.page_size, BLOCK=block,
        num_warps=_warps(block * triton.next_power_of_2(group) // 2), **launch,
    )  # fmt: skip
