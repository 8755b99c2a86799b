"""Decode attention of quantized pages in Gluon, one warp a program (see `packed.py` for how pages are read)."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from . import overlap, work
from .packed import (
    KEY_SHARED,
    LINE_SHARED,
    TOKEN_LAYOUT,
    VALUE_SHARED,
    copy_line,
    copy_tile,
    page_scores,
    unit_query,
    weighted_values,
)
from .packed_operands import (
    as_operand,
    folded,
    halves,
    in_row_order,
    in_value_order,
    key_channel,
    power_of_two_above,
    value_channel,
)

always_kept = gluon.jit(work.always_kept.fn)
first_window_page = gluon.jit(work.first_window_page.fn)
listed_pages = gluon.jit(work.listed_pages.fn)
run_start = gluon.jit(work.run_start.fn)
runs = gluon.jit(work.runs.fn)
sealed_pages = gluon.jit(work.sealed_pages.fn)
sequence_of = gluon.jit(work.sequence_of.fn)
pick = gluon.jit(work.pick.fn)
after_previous = gluon.jit(overlap.after_previous.fn)
let_next_start = gluon.jit(overlap.let_next_start.fn)

PROGRAMS_PER_MULTIPROCESSOR = 8
STAGES = 2


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _page_id(table, chosen, j, is_chosen, num_first, gap):
    """Page id of a list's entry j: chosen pages by the selection; else pages 0, 1, ... with a gap after num_first."""
    index = j + gl.where(j >= num_first, gap, 0)
    if is_chosen:
        index = gl.load(chosen + j)
    return gl.load(table + index).to(gl.int64)


@gluon.jit
def _copy_page(
    words, at, keys, key_ranges, values, value_ranges, stage, keep,
    VALUE_CODES: gl.constexpr, KEY_MIN: gl.constexpr, VALUE_MIN: gl.constexpr,
):  # fmt: skip
    """Starts copying the slot at a word offset to a stage of the ring."""
    slot = gl.multiple_of(words + gl.multiple_of(at, 4), 16)
    copy_tile(keys.index(stage), slot, keep)
    copy_line(key_ranges.index(stage), slot + KEY_MIN // 4, keep)
    copy_tile(values.index(stage), slot + VALUE_CODES // 4, keep)
    copy_line(value_ranges.index(stage), slot + VALUE_MIN // 4, keep)
    async_copy.commit_group()


@gluon.jit
def _decode_packed_kernel(
    query, out, partial_out, partial_max, partial_sum,
    retrieval_words, streaming_words, retrieval_heads, streaming_heads,
    rows_of, positions, budgets, retrieval_table, streaming_table, chosen_pages, chosen_counts, tail_key, tail_value,
    num_batch, scale, sink_size, window,
    query_stride_b, query_stride_h, out_stride_b, out_stride_h,
    retrieval_page_stride, streaming_page_stride, slot_stride, retrieval_table_stride, streaming_table_stride,
    chosen_stride_r, chosen_stride_h, count_stride_r,
    tk_stride_r, tk_stride_h, tk_stride_t, tv_stride_r, tv_stride_h, tv_stride_t,
    RETRIEVAL: gl.constexpr, STREAMING: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, LOGICAL: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr,
    KEY_MIN: gl.constexpr, KEY_STEP: gl.constexpr, VALUE_CODES: gl.constexpr, VALUE_MIN: gl.constexpr,
    VALUE_STEP: gl.constexpr,
    BLOCK_B: gl.constexpr, MIN_UNITS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    P: gl.constexpr = 64
    W: gl.constexpr = D // 4
    heads: gl.constexpr = RETRIEVAL + STREAMING
    C: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, C)
    ROW: gl.constexpr = gl.SliceLayout(1, C)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    GROUPS: gl.constexpr = P // LOGICAL
    BOOST: gl.constexpr = 14.0

    after_previous(PDL)
    let_next_start(PDL)
    program = gl.program_id(0)
    sink_pages = (sink_size + P - 1) // P
    lines = gl.arange(0, BLOCK_B, LINE)
    every_position = gl.load(positions + lines, mask=lines < num_batch, other=0).to(gl.int32)
    every_budget = gl.load(budgets + lines, mask=lines < num_batch, other=0)
    every_row = gl.load(rows_of + lines, mask=lines < num_batch, other=0).to(gl.int32)
    units = RETRIEVAL * (listed_pages(every_position, every_budget, sink_pages, window, P) + 1)
    units += STREAMING * (always_kept(every_position, sink_pages, window, P) + 1)
    ends = gl.associative_scan(gl.where(lines < num_batch, units, 0), 0, _add)
    total = gl.max(ends, 0)
    num_runs = runs(total, gl.num_programs(0), MIN_UNITS)
    unit = run_start(program, total, num_runs)
    last = run_start(program + 1, total, num_runs)

    n_b = gl.arange(0, N, gl.SliceLayout(0, B))
    k_b = key_channel(gl.arange(0, D, gl.SliceLayout(1, B)))
    column = gl.arange(0, N, COLUMN)
    m_row = value_channel(gl.arange(0, D, ROW), D)
    row_token = gl.arange(0, 32, ROW)
    row_token = row_token % 8 * 4 + row_token // 8

    keys = gl.allocate_shared_memory(gl.int32, [STAGES, 8 * KEY_BITS, W], KEY_SHARED)
    key_ranges = gl.allocate_shared_memory(gl.int32, [STAGES, GROUPS * D], LINE_SHARED)
    values = gl.allocate_shared_memory(gl.int32, [STAGES, 8 * VALUE_BITS, W], VALUE_SHARED)
    value_ranges = gl.allocate_shared_memory(gl.int32, [STAGES, P], LINE_SHARED)
    while unit < last:
        b, first = sequence_of(ends, unit)
        position = pick(every_position, lines, b)
        budget = pick(every_budget, lines, b)
        row = pick(every_row, lines, b).to(gl.int64)
        sealed = sealed_pages(position, P)
        listed = listed_pages(position, budget, sink_pages, window, P)
        offset = unit - first
        is_streaming = offset >= RETRIEVAL * (listed + 1)
        is_chosen = sealed < 0
        if is_streaming:
            length = always_kept(position, sink_pages, window, P)
            offset -= RETRIEVAL * (listed + 1)
            in_class = offset // (length + 1)
            order = RETRIEVAL + in_class
            start = offset % (length + 1)
            head = gl.load(streaming_heads + in_class).to(gl.int32)
            count = length
            num_first = sealed * 0 + sink_pages
            gap = gl.maximum(first_window_page(position, window, P), sink_pages) - sink_pages
            near = sealed * 0 + sink_size
            far = (position - window + 1).to(gl.int32)
        else:
            length = listed
            in_class = offset // (length + 1)
            order = in_class
            start = offset % (length + 1)
            head = gl.load(retrieval_heads + order).to(gl.int32)
            is_chosen = sealed + 1 > budget
            count = length
            if is_chosen:
                count = gl.load(chosen_counts + row * count_stride_r + head)
            num_first = sealed * 0
            gap = sealed * 0
            near = sealed * P
            far = sealed * 0
        words = retrieval_words
        page_stride = retrieval_page_stride.to(gl.int64)
        table = retrieval_table + b.to(gl.int64) * retrieval_table_stride
        if is_streaming:
            words = streaming_words
            page_stride = streaming_page_stride.to(gl.int64)
            table = streaming_table + b.to(gl.int64) * streaming_table_stride
        chosen = chosen_pages + row * chosen_stride_r + head * chosen_stride_h
        slot = in_class.to(gl.int64) * slot_stride
        stop = gl.minimum(start + last - unit, length + 1)
        unit += stop - start
        last_page = gl.minimum(stop, count)

        q_line = query + b.to(gl.int64) * query_stride_b + (head * GROUP + n_b) * query_stride_h
        q_mask = gl.expand_dims(n_b < GROUP, 0) & gl.expand_dims(k_b >= 0, 1)
        q = gl.load(gl.expand_dims(q_line, 0) + gl.expand_dims(k_b, 1), mask=q_mask, other=0.0).to(gl.float32)
        q_unit, unit_of_q = unit_query(q)
        factor = gl.expand_dims(gl.convert_layout(unit_of_q, COLUMN) * (scale * 16777216.0), 0)
        highest = gl.full([N], float("-inf"), gl.float32, COLUMN)
        weight = folded(gl.full([32, N], 0.0, gl.float32, C))
        minima = weight
        acc = gl.full([D, N], 0.0, gl.float32, C)
        value_unit = sealed.to(gl.float32) * 0.0 + 1.1754943508222875e-38

        final = gl.maximum(last_page - 1, 0)
        is_chosen = is_chosen & (start < last_page)
        id_ahead = _page_id(table, chosen, gl.minimum(start, final), is_chosen, num_first, gap)
        for ahead in gl.static_range(STAGES - 1):
            at = (id_ahead * page_stride + slot) // 4
            keep = start + ahead < last_page
            _copy_page(words, at, keys, key_ranges, values, value_ranges, ahead, keep, VALUE_CODES, KEY_MIN, VALUE_MIN)
            id_ahead = _page_id(table, chosen, gl.minimum(start + ahead + 1, final), is_chosen, num_first, gap)
        for j in range(start, last_page):
            at = (id_ahead * page_stride + slot) // 4
            newest = j + STAGES - 1
            to = (newest - start) % STAGES
            _copy_page(
                words,
                at,
                keys,
                key_ranges,
                values,
                value_ranges,
                to,
                newest < last_page,
                VALUE_CODES,
                KEY_MIN,
                VALUE_MIN,
            )
            id_ahead = _page_id(table, chosen, gl.minimum(newest + 1, final), is_chosen, num_first, gap)
            page_token = (j + gl.where(j >= num_first, gap, 0)) * P + row_token
            stage = (j - start) % STAGES
            async_copy.wait_group(STAGES - 1)
            s_low, s_high = page_scores(
                keys.index(stage), key_ranges.index(stage), q_unit, KEY_BITS, D, GROUPS, A, B, C
            )

            seen = (page_token < near) | (page_token >= far)
            s_low = gl.where(gl.expand_dims(seen, 1), s_low * factor, float("-inf"))
            seen = (page_token + 32 < near) | (page_token + 32 >= far)
            s_high = gl.where(gl.expand_dims(seen, 1), s_high * factor, float("-inf"))
            new_highest = gl.maximum(highest, gl.max(gl.maximum(s_low, s_high), 0))
            base = gl.where(new_highest == float("-inf"), 0.0, new_highest) - BOOST
            shrink = gl.exp2(highest - BOOST - base)
            highest = new_highest
            p_low = gl.exp2(s_low - gl.expand_dims(base, 0))
            p_high = gl.exp2(s_high - gl.expand_dims(base, 0))

            ranges = value_ranges.index(stage)
            vs0 = halves(ranges.slice(32, 16).load(TOKEN_LAYOUT)).to(gl.float32)
            vs1 = halves(ranges.slice(48, 16).load(TOKEN_LAYOUT)).to(gl.float32)
            new_unit = gl.maximum(value_unit, power_of_two_above(gl.max(gl.maximum(vs0, vs1), 0)))
            inverse = 1.0 / new_unit
            acc = acc * gl.expand_dims(shrink * (value_unit * inverse), 0)
            value_unit = new_unit
            step_low = gl.expand_dims(gl.convert_layout(in_row_order(vs0), ROW), 1)
            step_high = gl.expand_dims(gl.convert_layout(in_row_order(vs1), ROW), 1)
            vm0 = halves(ranges.slice(0, 16).load(TOKEN_LAYOUT)).to(gl.float32)
            vm1 = halves(ranges.slice(16, 16).load(TOKEN_LAYOUT)).to(gl.float32)
            min_low = gl.expand_dims(gl.convert_layout(in_row_order(vm0), ROW), 1)
            min_high = gl.expand_dims(gl.convert_layout(in_row_order(vm1), ROW), 1)
            shrink = gl.convert_layout(gl.expand_dims(shrink, 0), weight.type.layout)
            weight = weight * shrink + folded(p_low + p_high)
            minima = minima * shrink + folded(p_low * min_low + p_high * min_high)
            high_part: gl.constexpr = 0.0625 if VALUE_BITS == 4 else 1.0
            p_low = as_operand((p_low * (step_low * inverse)).to(gl.float16), B)
            p_high = as_operand((p_high * (step_high * (inverse * high_part))).to(gl.float16), B)
            acc = weighted_values(values.index(stage), p_low, p_high, acc, VALUE_BITS, D, A)

        minima = gl.convert_layout(gl.sum(minima, 0), COLUMN)
        acc = acc * (value_unit * 16777216.0) + gl.expand_dims(minima, 0)
        total_weight = gl.convert_layout(gl.sum(weight, 0), COLUMN)
        if stop > length:
            TILE: gl.constexpr = gl.BlockedLayout(
                [1, 8], [32 * 8 // D, D // 8] if D <= 256 else [1, 32], [1, 1], [1, 0]
            )
            tile_token = gl.arange(0, 32, gl.SliceLayout(1, TILE))
            tile_channel = gl.arange(0, D, gl.SliceLayout(0, TILE))
            k_plain = gl.arange(0, D, gl.SliceLayout(1, B))
            q_plain = gl.load(gl.expand_dims(q_line, 0) + gl.expand_dims(k_plain, 1), mask=q_mask, other=0.0)
            in_page = position % P
            for part in range(2):
                here = part * 32 + tile_token
                tile_mask = gl.expand_dims(here <= in_page, 1) & gl.expand_dims(tile_channel >= 0, 0)
                tail_at = gl.expand_dims(here.to(gl.int64) * tk_stride_t, 1) + gl.expand_dims(tile_channel, 0)
                key = gl.load(tail_key + row * tk_stride_r + head * tk_stride_h + tail_at, mask=tile_mask, other=0.0)
                tail_at = gl.expand_dims(here.to(gl.int64) * tv_stride_t, 1) + gl.expand_dims(tile_channel, 0)
                value = gl.load(
                    tail_value + row * tv_stride_r + head * tv_stride_h + tail_at, mask=tile_mask, other=0.0
                )
                s = mma_v2(gl.convert_layout(key, A), q_plain, gl.full([32, N], 0.0, gl.float32, C))
                here_row = part * 32 + gl.arange(0, 32, ROW)
                seen = here_row <= in_page
                if is_streaming:
                    where = sealed * P + here_row
                    seen = seen & ((where < sink_size) | (where >= far))
                s = gl.where(gl.expand_dims(seen, 1), s * scale, float("-inf"))
                new_highest = gl.maximum(highest, gl.max(s, 0))
                base = gl.where(new_highest == float("-inf"), 0.0, new_highest) - BOOST
                shrink = gl.exp2(highest - BOOST - base)
                highest = new_highest
                p = gl.exp2(s - gl.expand_dims(base, 0))
                total_weight = total_weight * shrink + gl.sum(p, 0)
                p = gl.convert_layout(p.to(q_plain.dtype), B)
                value = gl.convert_layout(in_value_order(value, D), A)
                acc = mma_v2(value, p, acc * gl.expand_dims(shrink, 0))

        member = gl.expand_dims(column, 0)
        in_out = (member < GROUP) & (gl.expand_dims(m_row, 1) >= 0)
        if (start == 0) & (stop > length):
            result = acc / gl.expand_dims(total_weight, 0)
            target = (
                out + b.to(gl.int64) * out_stride_b + (head * GROUP + member) * out_stride_h + gl.expand_dims(m_row, 1)
            )
            gl.store(target, result.to(out.dtype.element_ty), mask=in_out)
        else:
            place = (program + b * heads + order).to(gl.int64) * GROUP
            gl.store(partial_out + (place + member) * D + gl.expand_dims(m_row, 1), acc, mask=in_out)
            gl.store(partial_max + place + column, highest, mask=column < GROUP)
            gl.store(partial_sum + place + column, total_weight, mask=column < GROUP)


def launch(programs: int, *arguments: object, **constants: int) -> None:
    """Launches the kernel; pools come as uint8 and fp16 views (`decode_attention` says in which order)."""
    query, out, partial_out, partial_max, partial_sum, codes, _, streaming_codes, _, *rest = arguments
    _decode_packed_kernel[(programs,)](
        query, out, partial_out, partial_max, partial_sum,
        codes.view(torch.int32), streaming_codes.view(torch.int32), *rest,
        **constants, STAGES=STAGES, num_warps=1,
    )  # fmt: skip
