"""Second stage of `page_select` for quantized pages in Gluon, one warp a program (see `packed.py` for how pages are
read).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from . import overlap, work
from .packed import KEY_SHARED, LINE_SHARED, copy_line, copy_tile, page_scores, unit_query
from .packed_operands import key_channel

run_start = gluon.jit(work.run_start.fn)
runs = gluon.jit(work.runs.fn)
sealed_pages = gluon.jit(work.sealed_pages.fn)
candidate_bound = gluon.jit(work.candidate_bound.fn)
always_kept = gluon.jit(work.always_kept.fn)
chooses = gluon.jit(work.chooses.fn)
sequence_of = gluon.jit(work.sequence_of.fn)
pick = gluon.jit(work.pick.fn)
after_previous = gluon.jit(overlap.after_previous.fn)
let_next_start = gluon.jit(overlap.let_next_start.fn)

STAGES = 2
PROGRAMS = 16
"""At most so many a multiprocessor."""
REGISTERS = 128
"""So that as many fit: of 4-bit keys, without spills. Of 8-bit keys shared memory holds fewer."""


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _copy_keys(words, at, keys, key_ranges, stage, keep, KEY_MIN: gl.constexpr):
    """Starts copying the keys of the slot at a word offset to a stage of the ring."""
    slot = gl.multiple_of(words + gl.multiple_of(at, 4), 16)
    copy_tile(keys.index(stage), slot, keep)
    copy_line(key_ranges.index(stage), slot + KEY_MIN // 4, keep)
    async_copy.commit_group()


@gluon.jit
def _first_index(listed, j, length, last_page):
    """A candidate's page index, 0 past the last; read before it is known which is the last."""
    index = gl.load(listed + gl.maximum(gl.minimum(j, length - 1), 0))
    return gl.where(j < last_page, index, 0)


@gluon.jit
def _masses_packed_kernel(
    query, masses, words, retrieval_heads, rows_of, positions, budgets, reselects,
    retrieval_table, candidates, candidate_counts, tail_key,
    num_batch, scale, factor, sink_size, window, query_stride_b, query_stride_h, page_stride, slot_stride,
    table_stride, width,
    tk_stride_r, tk_stride_h, tk_stride_t,
    RETRIEVAL: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr, D: gl.constexpr, LOGICAL: gl.constexpr,
    KEY_BITS: gl.constexpr, KEY_MIN: gl.constexpr, BLOCK_B: gl.constexpr, MIN_UNITS: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of every listed page's scores, float32 [B, R, group_size, width + 1]; the own page's is
    last.
    """
    P: gl.constexpr = 64
    W: gl.constexpr = D // 4
    GROUPS: gl.constexpr = P // LOGICAL
    C: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, C, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, C)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])

    sink_pages = (sink_size + P - 1) // P
    lines = gl.arange(0, BLOCK_B, LINE)
    real = lines < num_batch
    position = gl.load(positions + lines, mask=real, other=0).to(gl.int32)
    budget = gl.load(budgets + lines, mask=real, other=1)
    chosen = real & chooses(position, budget, gl.load(reselects + lines, mask=real, other=0), P)
    units = (candidate_bound(position, budget, factor, sink_pages, window, P) + 1) * RETRIEVAL
    ends = gl.associative_scan(gl.where(chosen, units, 0), 0, _add)
    total = gl.max(ends, 0)
    num_runs = runs(total, gl.num_programs(0), MIN_UNITS)
    unit = run_start(gl.program_id(0), total, num_runs)
    last = run_start(gl.program_id(0) + 1, total, num_runs)
    n_b = gl.arange(0, N, gl.SliceLayout(0, B))
    k_plain = gl.arange(0, D, gl.SliceLayout(1, B))
    k_b = key_channel(k_plain)
    column = gl.arange(0, N, COLUMN)
    keys = gl.allocate_shared_memory(gl.int32, [STAGES, 8 * KEY_BITS, W], KEY_SHARED)
    key_ranges = gl.allocate_shared_memory(gl.int32, [STAGES, GROUPS * D], LINE_SHARED)
    after_previous(PDL)
    let_next_start(PDL)
    while unit < last:
        b, first = sequence_of(ends, unit)
        own_position = pick(position, lines, b)
        length = candidate_bound(own_position, pick(budget, lines, b), factor, sink_pages, window, P)
        order = (unit - first) // (length + 1)
        start = (unit - first) % (length + 1)
        stop = gl.minimum(start + last - unit, length + 1)
        unit += stop - start
        head = gl.load(retrieval_heads + order).to(gl.int32)
        slot = order.to(gl.int64) * slot_stride
        pair = (b * RETRIEVAL + order).to(gl.int64)
        last_page = gl.minimum(stop, gl.load(candidate_counts + pair))
        q_line = query + b.to(gl.int64) * query_stride_b + (head * GROUP + n_b) * query_stride_h
        q_mask = gl.expand_dims(n_b < GROUP, 0) & gl.expand_dims(k_b >= 0, 1)
        q = gl.load(gl.expand_dims(q_line, 0) + gl.expand_dims(k_b, 1), mask=q_mask, other=0.0).to(gl.float32)
        q_unit, unit_of_q = unit_query(q)
        by_head = gl.expand_dims(gl.convert_layout(unit_of_q, COLUMN) * (scale * 16777216.0), 0)
        target = masses + (pair * GROUP + column) * (width + 1)
        table = retrieval_table + b.to(gl.int64) * table_stride
        listed = candidates + pair * width

        final = gl.maximum(last_page - 1, 0)
        for i in gl.static_range(STAGES - 1):
            index = _first_index(listed, start + i, length, last_page)
            at = (gl.load(table + index).to(gl.int64) * page_stride + slot) // 4
            _copy_keys(words, at, keys, key_ranges, i, start + i < last_page, KEY_MIN)
        index = _first_index(listed, start + STAGES - 1, length, last_page)
        id_ahead = gl.load(table + index).to(gl.int64)
        index = _first_index(listed, start + STAGES, length, last_page)
        for j in range(start, last_page):
            newest = j + STAGES - 1
            at = (id_ahead * page_stride + slot) // 4
            _copy_keys(words, at, keys, key_ranges, (newest - start) % STAGES, newest < last_page, KEY_MIN)
            id_ahead = gl.load(table + index).to(gl.int64)
            index = gl.load(listed + gl.minimum(newest + 2, final))
            stage = (j - start) % STAGES
            async_copy.wait_group(STAGES - 1)
            low, high = page_scores(keys.index(stage), key_ranges.index(stage), q_unit, KEY_BITS, D, GROUPS, A, B, C)
            low = low * by_head
            high = high * by_head
            highest = gl.max(gl.maximum(low, high), 0)
            base = gl.expand_dims(highest, 0)
            weight = gl.sum(gl.exp2(low - base) + gl.exp2(high - base), 0)
            gl.store(target + j, highest + gl.log2(weight), mask=column < GROUP)

        if stop > length:
            TILE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [1, 1], [1, 0])
            channel = gl.arange(0, D, gl.SliceLayout(0, TILE))
            in_page = own_position % P
            row = gl.load(rows_of + b).to(gl.int64)
            q_plain = gl.load(gl.expand_dims(q_line, 0) + gl.expand_dims(k_plain, 1), mask=q_mask, other=0.0)
            highest = gl.full([N], float("-inf"), gl.float32, COLUMN)
            weight = gl.full([N], 0.0, gl.float32, COLUMN)
            for part in range(2):
                token = part * 32 + gl.arange(0, 32, gl.SliceLayout(1, TILE))
                tile_mask = gl.expand_dims(token <= in_page, 1) & gl.expand_dims(channel >= 0, 0)
                tail_at = gl.expand_dims(token.to(gl.int64) * tk_stride_t, 1) + gl.expand_dims(channel, 0)
                key = gl.load(tail_key + row * tk_stride_r + head * tk_stride_h + tail_at, mask=tile_mask, other=0.0)
                s = mma_v2(gl.convert_layout(key, A), q_plain, gl.full([32, N], 0.0, gl.float32, C))
                seen = part * 32 + gl.arange(0, 32, gl.SliceLayout(1, C)) <= in_page
                s = gl.where(gl.expand_dims(seen, 1), s * scale, float("-inf"))
                new_highest = gl.maximum(highest, gl.max(s, 0))
                weight = weight * gl.exp2(highest - new_highest) + gl.sum(
                    gl.exp2(s - gl.expand_dims(new_highest, 0)), 0
                )
                highest = new_highest
            gl.store(target + width, highest + gl.log2(weight), mask=column < GROUP)


def launch(
    programs: int, query: torch.Tensor, masses: torch.Tensor, codes: torch.Tensor, *rest: object, **constants: int
) -> None:
    """Launches the kernel; codes: the pool, uint8."""
    _masses_packed_kernel[(programs,)](
        query, masses, codes.view(torch.int32), *rest, **constants, STAGES=STAGES, num_warps=1,
        maxnreg=REGISTERS if constants["KEY_BITS"] == 4 else None,
    )  # fmt: skip
