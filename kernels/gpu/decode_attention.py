"""Triton kernels of `decode_attention`: split over pages of both head classes at once, then a merge by log-sum-exp.

A unit of work is one page of one KV head; the head's tail is its last unit. Pages are prefetched one ahead into
registers, page ids two ahead, so that no load waits for another.
"""

import torch
import triton
import triton.language as tl

from ..views import DecodeBatch, LayerView, Selection
from .codec import INTERPRETED, dequantize, load_codes, load_halves, math_dtype, pool_views
from .overlap import after_previous, can_overlap, let_next_start
from .work import (
    always_kept,
    first_window_page,
    listed_pages,
    num_programs,
    pick,
    run_of,
    run_start,
    runs,
    sealed_pages,
    sequence_of,
)

if not INTERPRETED:
    from . import decode_packed, packed

PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_UNITS = 2
MERGE_BLOCK = 64
LOG2_E = 1.4426950408889634


@triton.jit
def _unit_ends(
    positions, budgets, num_batch, sink_pages, window,
    RETRIEVAL: tl.constexpr, STREAMING: tl.constexpr, P: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Positions, budgets and the running ends of the sequences' units, int32 [BLOCK_B]."""
    b = tl.arange(0, BLOCK_B)
    position = tl.load(positions + b, mask=b < num_batch, other=0).to(tl.int32)
    budget = tl.load(budgets + b, mask=b < num_batch, other=0)
    units = RETRIEVAL * (listed_pages(position, budget, sink_pages, window, P) + 1)
    units += STREAMING * (always_kept(position, sink_pages, window, P) + 1)
    return position, budget, tl.cumsum(tl.where(b < num_batch, units, 0), 0)


@triton.jit
def _page_id(table, chosen, j, is_chosen, num_first, gap):
    """Page id of a list's entry j: chosen pages by the selection; else pages 0, 1, ... with a gap after num_first."""
    index = j + tl.where(j >= num_first, gap, 0)
    if is_chosen:
        index = tl.load(chosen + j)
    return tl.load(table + index).to(tl.int64), index


@triton.jit
def _load_key_range(
    half, slot, columns, keep,
    D: tl.constexpr, HALF: tl.constexpr, LOGICAL: tl.constexpr, BITS: tl.constexpr, MIN: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Step and minimum of the low half's keys, then of the high half's, of the slot at a byte offset."""
    if BITS >= 16:
        return 0.0, 0.0, 0.0, 0.0
    else:
        low_step = load_halves(half, slot // 2 + STEP // 2, columns, D, LOGICAL, HALF, 0, keep)
        low_min = load_halves(half, slot // 2 + MIN // 2, columns, D, LOGICAL, HALF, 0, keep)
        high_step = load_halves(half, slot // 2 + STEP // 2, columns, D, LOGICAL, HALF, 1, keep)
        high_min = load_halves(half, slot // 2 + MIN // 2, columns, D, LOGICAL, HALF, 1, keep)
        return low_step, low_min, high_step, high_min


@triton.jit
def _load_value_range(
    half, slot, rows, keep, HALF: tl.constexpr, BITS: tl.constexpr, MIN: tl.constexpr, STEP: tl.constexpr
):
    """The same of the values, per token."""
    if BITS >= 16:
        return 0.0, 0.0, 0.0, 0.0
    else:
        mask = keep & (rows >= 0)
        low_step = tl.load(half + slot // 2 + STEP // 2 + rows, mask=mask, other=0)
        low_min = tl.load(half + slot // 2 + MIN // 2 + rows, mask=mask, other=0)
        high_step = tl.load(half + slot // 2 + STEP // 2 + HALF + rows, mask=mask, other=0)
        high_min = tl.load(half + slot // 2 + MIN // 2 + HALF + rows, mask=mask, other=0)
        return low_step, low_min, high_step, high_min


@triton.jit
def _decode_kernel(
    query, out, partial_out, partial_max, partial_sum,
    retrieval_codes, retrieval_half, streaming_codes, streaming_half, retrieval_heads, streaming_heads,
    rows_of, positions, budgets, retrieval_table, streaming_table, chosen_pages, chosen_counts, tail_key, tail_value,
    num_batch, scale, sink_size, window,
    query_stride_b, query_stride_h, out_stride_b, out_stride_h,
    retrieval_page_stride, streaming_page_stride, slot_stride, retrieval_table_stride, streaming_table_stride,
    chosen_stride_r, chosen_stride_h, count_stride_r,
    tk_stride_r, tk_stride_h, tk_stride_t, tv_stride_r, tv_stride_h, tv_stride_t,
    RETRIEVAL: tl.constexpr, STREAMING: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, LOGICAL: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_MIN: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_CODES: tl.constexpr, VALUE_MIN: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    DTYPE: tl.constexpr, TAIL_DTYPE: tl.constexpr, BLOCK_B: tl.constexpr, MIN_UNITS: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 2 * HALF
    UNIT: tl.constexpr = 8 if KEY_BITS < 16 else KEY_BITS
    BOOST: tl.constexpr = 14.0  # keeps small probabilities clear of fp16's subnormals; it cancels in the division
    heads: tl.constexpr = RETRIEVAL + STREAMING
    after_previous(PDL)
    let_next_start(PDL)
    program = tl.program_id(0)
    sink_pages = (sink_size + P - 1) // P
    _, _, ends = _unit_ends(positions, budgets, num_batch, sink_pages, window, RETRIEVAL, STREAMING, P, BLOCK_B)
    total = tl.max(ends, 0)
    num_runs = runs(total, tl.num_programs(0), MIN_UNITS)
    unit = run_start(program, total, num_runs)
    last = run_start(program + 1, total, num_runs)

    g = tl.arange(0, BLOCK_G)
    rows = tl.arange(0, HALF)
    columns = tl.arange(0, BLOCK_D)
    in_query = (g < GROUP)[:, None] & (columns < D)[None, :]
    while unit < last:
        b, first = sequence_of(ends, unit)
        position = tl.load(positions + b)
        budget = tl.load(budgets + b)
        row = tl.load(rows_of + b).to(tl.int64)
        sealed = sealed_pages(position, P)
        listed = listed_pages(position, budget, sink_pages, window, P)
        offset = unit - first
        is_streaming = offset >= RETRIEVAL * (listed + 1)
        if is_streaming:
            count = always_kept(position, sink_pages, window, P)
            offset -= RETRIEVAL * (listed + 1)
            in_class = offset // (count + 1)
            order = RETRIEVAL + in_class
            length = count
            start = offset % (count + 1)
            head = tl.load(streaming_heads + in_class).to(tl.int32)
            is_chosen = sealed < 0
            num_first = sealed * 0 + sink_pages
            gap = tl.maximum(first_window_page(position, window, P), sink_pages) - sink_pages
            near = sealed * 0 + sink_size
            far = (position - window + 1).to(tl.int32)
        else:
            in_class = offset // (listed + 1)
            order = in_class
            length = listed
            start = offset % (listed + 1)
            head = tl.load(retrieval_heads + order).to(tl.int32)
            is_chosen = sealed + 1 > budget
            count = listed
            if is_chosen:
                count = tl.load(chosen_counts + row * count_stride_r + head)
            num_first = sealed * 0
            gap = sealed * 0
            near = sealed * P
            far = sealed * 0
        codes = tl.where(is_streaming, streaming_codes, retrieval_codes)
        half = tl.where(is_streaming, streaming_half, retrieval_half)
        page_stride = tl.where(is_streaming, streaming_page_stride, retrieval_page_stride)
        table = tl.where(
            is_streaming,
            streaming_table + b.to(tl.int64) * streaming_table_stride,
            retrieval_table + b.to(tl.int64) * retrieval_table_stride,
        )
        chosen = chosen_pages + row * chosen_stride_r + head * chosen_stride_h
        slot = tl.multiple_of(in_class.to(tl.int64) * slot_stride, 16)
        stop = tl.minimum(start + last - unit, length + 1)
        unit += stop - start
        last_page = tl.minimum(stop, count)

        q_pointers = (
            query + b.to(tl.int64) * query_stride_b + (head * GROUP + g)[:, None] * query_stride_h + columns[None, :]
        )
        q = tl.load(q_pointers, mask=in_query, other=0).to(DTYPE)
        highest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)

        final = tl.maximum(last_page - 1, 0)
        is_chosen = is_chosen & (start < last_page)
        id_now, index = _page_id(table, chosen, tl.minimum(start, final), is_chosen, num_first, gap)
        at = tl.multiple_of(id_now * page_stride, 16) + slot
        keep = start < last_page
        ks0, km0, ks1, km1 = _load_key_range(half, at, columns, keep, D, HALF, LOGICAL, KEY_BITS, KEY_MIN, KEY_STEP)
        vs0, vm0, vs1, vm1 = _load_value_range(half, at, rows, keep, HALF, VALUE_BITS, VALUE_MIN, VALUE_STEP)
        id_next, index_next = _page_id(table, chosen, tl.minimum(start + 1, final), is_chosen, num_first, gap)
        for j in tl.range(start, last_page, num_stages=1):
            k0 = load_codes(codes, at * 8 // UNIT, D, rows, columns, D, True)
            k1 = k0 if KEY_BITS == 4 else load_codes(codes, at * 8 // UNIT + HALF * D, D, rows, columns, D, True)
            v_at = (at + VALUE_CODES) * 8 // UNIT
            v0 = load_codes(codes, v_at, D, rows, columns, D, True)
            v1 = v0 if VALUE_BITS == 4 else load_codes(codes, v_at + HALF * D, D, rows, columns, D, True)
            token = index * P + rows
            at = tl.multiple_of(id_next * page_stride, 16) + slot
            index = index_next
            id_next, index_next = _page_id(table, chosen, tl.minimum(j + 2, final), is_chosen, num_first, gap)

            low, high = dequantize(k0, k1, ks0, km0, ks1, km1, KEY_BITS, DTYPE, ASM, True)
            ks0, km0, ks1, km1 = _load_key_range(half, at, columns, keep, D, HALF, LOGICAL, KEY_BITS, KEY_MIN, KEY_STEP)
            s_low = tl.dot(q, tl.trans(low), input_precision="ieee") * scale
            s_high = tl.dot(q, tl.trans(high), input_precision="ieee") * scale
            s_low = tl.where(((token < near) | (token >= far))[None, :], s_low, float("-inf"))
            s_high = tl.where(((token + HALF < near) | (token + HALF >= far))[None, :], s_high, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(tl.maximum(s_low, s_high), 1))
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest) - BOOST
            shrink = tl.exp2(highest - BOOST - base)
            p_low = tl.exp2(s_low - base[:, None])
            p_high = tl.exp2(s_high - base[:, None])
            weight = weight * shrink + tl.sum(p_low + p_high, 1)
            highest = new_highest
            low, high = dequantize(v0, v1, vs0, vm0, vs1, vm1, VALUE_BITS, DTYPE, ASM, False)
            vs0, vm0, vs1, vm1 = _load_value_range(half, at, rows, keep, HALF, VALUE_BITS, VALUE_MIN, VALUE_STEP)
            acc = acc * shrink[:, None]
            acc = tl.dot(p_low.to(DTYPE), low, acc, input_precision="ieee")
            acc = tl.dot(p_high.to(DTYPE), high, acc, input_precision="ieee")

        if stop > length:
            q_tail = tl.load(q_pointers, mask=in_query, other=0).to(TAIL_DTYPE)
            for part in tl.range(2, num_stages=1):
                token = sealed * P + part * HALF + rows
                seen = token <= position
                if is_streaming:
                    seen = seen & ((token < sink_size) | (position - token < window))
                mask = seen[:, None] & (columns < D)[None, :]
                tail_rows = (part * HALF + rows).to(tl.int64)[:, None]
                key = tl.load(
                    tail_key + row * tk_stride_r + head * tk_stride_h + tail_rows * tk_stride_t + columns[None, :],
                    mask=mask,
                    other=0,
                ).to(TAIL_DTYPE)
                value = tl.load(
                    tail_value + row * tv_stride_r + head * tv_stride_h + tail_rows * tv_stride_t + columns[None, :],
                    mask=mask,
                    other=0,
                ).to(TAIL_DTYPE)
                s = tl.dot(q_tail, tl.trans(key), input_precision="ieee") * scale
                s = tl.where(seen[None, :], s, float("-inf"))
                new_highest = tl.maximum(highest, tl.max(s, 1))
                base = tl.where(new_highest == float("-inf"), 0.0, new_highest) - BOOST
                shrink = tl.exp2(highest - BOOST - base)
                p = tl.exp2(s - base[:, None])
                weight = weight * shrink + tl.sum(p, 1)
                highest = new_highest
                acc = tl.dot(p.to(TAIL_DTYPE), value, acc * shrink[:, None], input_precision="ieee")

        if (start == 0) & (stop > length):
            result = acc / weight[:, None]
            out_pointers = (
                out + b.to(tl.int64) * out_stride_b + (head * GROUP + g)[:, None] * out_stride_h + columns[None, :]
            )
            tl.store(out_pointers, result.to(out.dtype.element_ty), mask=in_query)
        else:
            place = (program + b * heads + order).to(tl.int64) * GROUP + g
            tl.store(partial_out + place[:, None] * D + columns[None, :], acc, mask=in_query)
            tl.store(partial_max + place, highest, mask=g < GROUP)
            tl.store(partial_sum + place, weight, mask=g < GROUP)


@triton.jit
def _merge_kernel(
    out, partial_out, partial_max, partial_sum, retrieval_heads, streaming_heads, positions, budgets,
    num_batch, sink_size, window, programs, out_stride_b, out_stride_h,
    RETRIEVAL: tl.constexpr, STREAMING: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    P: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr, MIN_UNITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One query head of one sequence: its parts weighted by their sums. Which parts they are is found while the kernel
    ahead runs.
    """
    heads: tl.constexpr = RETRIEVAL + STREAMING
    pair = tl.program_id(0)
    member = tl.program_id(1)
    b = pair // heads
    order = pair % heads
    sink_pages = (sink_size + P - 1) // P
    every_position, every_budget, ends = _unit_ends(
        positions, budgets, num_batch, sink_pages, window, RETRIEVAL, STREAMING, P, BLOCK_B
    )
    lines = tl.arange(0, BLOCK_B)
    total = tl.max(ends, 0)
    num_runs = runs(total, programs, MIN_UNITS)
    position = pick(every_position, lines, b)
    length = listed_pages(position, pick(every_budget, lines, b), sink_pages, window, P) + 1
    first = tl.max(tl.where(lines < b, ends, 0), 0)
    if order < RETRIEVAL:
        first += order * length
        head = tl.load(retrieval_heads + order).to(tl.int32)
    else:
        first += RETRIEVAL * length
        length = always_kept(position, sink_pages, window, P) + 1
        first += (order - RETRIEVAL) * length
        head = tl.load(streaming_heads + order - RETRIEVAL).to(tl.int32)
    low = run_of(first, total, num_runs)
    high = run_of(first + length - 1, total, num_runs)
    after_previous(PDL)
    let_next_start(PDL)
    if low == high:
        return
    columns = tl.arange(0, BLOCK_D)
    highest = float("-inf")
    weight = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(low, high + 1, BLOCK):
        part = start + tl.arange(0, BLOCK)
        keep = part <= high
        place = (part + pair).to(tl.int64) * GROUP + member
        part_max = tl.load(partial_max + place, mask=keep, other=float("-inf"))
        part_sum = tl.load(partial_sum + place, mask=keep, other=0.0)
        mask = keep[:, None] & (columns < D)[None, :]
        part_out = tl.load(partial_out + place[:, None] * D + columns[None, :], mask=mask, other=0.0)
        new_highest = tl.maximum(highest, tl.max(part_max, 0))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        share = tl.exp2(part_max - base)
        shrink = tl.exp2(highest - base)
        weight = weight * shrink + tl.sum(share * part_sum, 0)
        acc = acc * shrink + tl.sum(share[:, None] * part_out, 0)
        highest = new_highest
    target = out + b.to(tl.int64) * out_stride_b + (head * GROUP + member) * out_stride_h + columns
    tl.store(target, (acc / weight).to(out.dtype.element_ty), mask=columns < D)


def decode_attention(query: torch.Tensor, layer: LayerView, batch: DecodeBatch, selection: Selection) -> torch.Tensor:
    """See `kernels.decode_attention.decode_attention`."""
    num_batch, num_query_heads, head_dim = query.shape
    out = torch.empty_like(query)
    if not num_batch:
        return out
    layout = layer.layout
    num_heads = layer.head_slots.numel()
    group = num_query_heads // num_heads
    num_retrieval, num_streaming = layer.retrieval_heads.numel(), layer.streaming_heads.numel()
    is_packed = not INTERPRETED and packed.supports(layout, query, layer.tail_key, group)
    per_multiprocessor = PROGRAMS_PER_MULTIPROCESSOR
    if is_packed:
        ring = decode_packed.STAGES * layout.slot_bytes
        per_multiprocessor = packed.programs_per_multiprocessor(ring, decode_packed.PROGRAMS_PER_MULTIPROCESSOR)
    programs = num_programs(query, per_multiprocessor)
    places = programs + num_batch * num_heads
    partial_out = torch.empty(places, group, head_dim, dtype=torch.float32, device=query.device)
    partial_max, partial_sum = torch.empty(2, places, group, dtype=torch.float32, device=query.device)
    retrieval_codes, retrieval_half = pool_views(layer.retrieval_pool[:, layer.first_retrieval_slot :], layout)
    streaming_codes, streaming_half = pool_views(layer.streaming_pool[:, layer.first_streaming_slot :], layout)
    block_b, block_d = triton.next_power_of_2(num_batch), triton.next_power_of_2(head_dim)
    overlap = can_overlap(query.device)
    launch = {"PDL": overlap, "launch_pdl": overlap}
    common = {
        "RETRIEVAL": num_retrieval, "STREAMING": num_streaming, "GROUP": group, "D": head_dim,
        "LOGICAL": layout.logical_page_size, "KEY_BITS": layout.key_bits, "VALUE_BITS": layout.value_bits,
        "KEY_MIN": layout.key_min, "KEY_STEP": layout.key_step, "VALUE_CODES": layout.value_codes,
        "VALUE_MIN": layout.value_min, "VALUE_STEP": layout.value_step, "BLOCK_B": block_b, "MIN_UNITS": MIN_UNITS,
        **launch,
    }  # fmt: skip
    arguments = (
        layer.retrieval_heads, layer.streaming_heads,
        batch.rows, batch.positions, batch.budget_pages, batch.retrieval_table, batch.streaming_table,
        selection.pages, selection.counts, layer.tail_key, layer.tail_value,
        num_batch, layer.scale * LOG2_E, layer.sink_size, layer.local_window,
        *query.stride()[:2], *out.stride()[:2],
        layer.retrieval_pool.stride(0), layer.streaming_pool.stride(0), layout.slot_bytes,
        batch.retrieval_table.stride(0), batch.streaming_table.stride(0),
        selection.pages.stride(0), selection.pages.stride(1), selection.counts.stride(0),
        *layer.tail_key.stride()[:3], *layer.tail_value.stride()[:3],
    )  # fmt: skip
    partial = (query, out, partial_out, partial_max, partial_sum)
    pools = (retrieval_codes, retrieval_half, streaming_codes, streaming_half)
    if is_packed:
        decode_packed.launch(programs, *partial, *pools, *arguments, N=8 if group <= 8 else 16, **common)
    else:
        tail_dtype = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(query.dtype, tl.float32)
        _decode_kernel[(programs,)](
            *partial, *pools, *arguments,
            BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d, HALF=layout.page_size // 2,
            DTYPE=math_dtype(layout, query.dtype), TAIL_DTYPE=tail_dtype, ASM=not INTERPRETED,
            num_warps=8 if block_d >= 256 else 4, **common,
        )  # fmt: skip
    _merge_kernel[(num_batch * num_heads, group)](
        out, partial_out, partial_max, partial_sum, layer.retrieval_heads, layer.streaming_heads,
        batch.positions, batch.budget_pages, num_batch, layer.sink_size, layer.local_window, programs,
        *out.stride()[:2],
        RETRIEVAL=num_retrieval, STREAMING=num_streaming, GROUP=group, D=head_dim, BLOCK_D=block_d,
        P=layout.page_size, BLOCK_B=block_b, BLOCK=MERGE_BLOCK, MIN_UNITS=MIN_UNITS,
        num_warps=4, **launch,
    )  # fmt: skip
    return out
