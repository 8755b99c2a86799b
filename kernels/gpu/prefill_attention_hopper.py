"""Gluon kernel of `prefill_attention` for retrieval heads on sm_90: a producer warp and two consumer warpgroups.

One program computes 128 query rows of one query head; each consumer owns 64 of them, which is exactly one page. The
diagonal block comes first and costs no more than in plain causal attention: the first consumer reads its own page as
written, the second the page before as decoded and its own as written. Then both walk the row's earlier blocks without a
mask, through a ring of 128-key slots that the producer fills by TMA. The products of step i + 1 are issued before the
softmax of step i is needed, so tensor cores and exponentials overlap (FlashAttention-3, arXiv 2407.08608).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..views import BlockLists, LayerView
from .prefill_attention import LOG2_E, list_arguments

BLOCK = gl.constexpr(128)
PAGE = gl.constexpr(64)


@gluon.jit
def _produce(
    descriptors, buffers, barriers, source, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr
):
    """Fills the diagonal pages, then the ring. scratch_row: the descriptor row of the KV head's position 0."""
    queries, keys, values, key_pages, value_pages, key_blocks, value_blocks = descriptors
    q_pages, k_pages, v_pages, k_slots, v_slots = buffers
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    token, position, scratch_row, head, kv_head, blocks, num_blocks = source
    nbytes: gl.constexpr = PAGE * HEAD_DIM * 2
    column = kv_head * HEAD_DIM

    mbarrier.expect(q_ready, 2 * nbytes)
    tma.async_copy_global_to_shared(queries, [token, head * HEAD_DIM], q_ready, q_pages.index(0))
    tma.async_copy_global_to_shared(queries, [token + PAGE, head * HEAD_DIM], q_ready, q_pages.index(1))
    mbarrier.expect(k_ready.index(0), nbytes)
    tma.async_copy_global_to_shared(keys, [token, column], k_ready.index(0), k_pages.index(0))
    mbarrier.expect(k_ready.index(1), 2 * nbytes)
    tma.async_copy_global_to_shared(key_pages, [scratch_row + position, 0], k_ready.index(1), k_pages.index(2))
    tma.async_copy_global_to_shared(keys, [token + PAGE, column], k_ready.index(1), k_pages.index(3))
    mbarrier.expect(v_ready.index(0), nbytes)
    tma.async_copy_global_to_shared(values, [token, column], v_ready.index(0), v_pages.index(0))
    mbarrier.expect(v_ready.index(1), 2 * nbytes)
    tma.async_copy_global_to_shared(value_pages, [scratch_row + position, 0], v_ready.index(1), v_pages.index(2))
    tma.async_copy_global_to_shared(values, [token + PAGE, column], v_ready.index(1), v_pages.index(3))

    for i in range(num_blocks):
        slot = i % STAGES
        phase = (i // STAGES) & 1
        row = scratch_row + i * BLOCK
        if LISTED:
            row = scratch_row + gl.load(blocks + i) * BLOCK
        mbarrier.wait(k_free.index(slot), phase)
        mbarrier.expect(k_ready.index(slot), 2 * nbytes)
        tma.async_copy_global_to_shared(key_blocks, [row, 0], k_ready.index(slot), k_slots.index(slot))
        mbarrier.wait(v_free.index(slot), phase)
        mbarrier.expect(v_ready.index(slot), 2 * nbytes)
        tma.async_copy_global_to_shared(value_blocks, [row, 0], v_ready.index(slot), v_slots.index(slot))


@gluon.jit
def _softmax(logits, peak, total, log2_scale):
    """One online-softmax step: unnormalised weights, decay of what came before, new peak (log2 units), new total."""
    new_peak = gl.maximum(peak, gl.max(logits, 1) * log2_scale)
    weights = gl.exp2(logits * log2_scale - new_peak[:, None])
    decay = gl.exp2(peak - new_peak)
    return weights, decay, new_peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def _attend_diagonal(q, k_pages, v_pages, acc, log2_scale, WHICH: gl.constexpr):
    """The row's first keys: its own page, causal, and for the second page of the tile the one before it."""
    o_layout: gl.constexpr = acc.type.layout
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PAGE, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zero = gl.zeros([PAGE, PAGE], gl.float32, layout)
    own = warpgroup_mma(q, k_pages.index(3 * WHICH).permute((1, 0)), zero, use_acc=False, is_async=True)
    if WHICH == 1:
        before = warpgroup_mma(q, k_pages.index(2).permute((1, 0)), zero, use_acc=False, is_async=True)
        own, before = warpgroup_mma_wait(0, deps=[own, before])
    else:
        own = warpgroup_mma_wait(0, deps=[own])
    rows = gl.arange(0, PAGE, gl.SliceLayout(1, layout))
    columns = gl.arange(0, PAGE, gl.SliceLayout(0, layout))
    own = gl.where(columns[None, :] <= rows[:, None], own, -float("inf"))
    peak = gl.max(own, 1)
    if WHICH == 1:
        peak = gl.maximum(peak, gl.max(before, 1))
    peak = peak * log2_scale
    weights = gl.exp2(own * log2_scale - peak[:, None])
    total = gl.sum(weights, 1)
    weights = gl.convert_layout(weights.to(q.dtype), weight_layout)
    acc = warpgroup_mma(weights, v_pages.index(3 * WHICH), acc, is_async=True)
    if WHICH == 1:
        weights = gl.exp2(before * log2_scale - peak[:, None])
        total += gl.sum(weights, 1)
        weights = gl.convert_layout(weights.to(q.dtype), weight_layout)
        acc = warpgroup_mma(weights, v_pages.index(2), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    return acc, peak, total


@gluon.jit
def _consume(buffers, barriers, tile, WHICH: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """The 64 rows of page WHICH of a tile: diagonal pages, then the ring, then the store."""
    out, out_token, tokens_left, num_blocks, log2_scale = tile
    q_pages, k_pages, v_pages, k_slots, v_slots = buffers
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    rows_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = q_pages.dtype
    left = tokens_left - WHICH * PAGE

    mbarrier.wait(k_ready.index(1 - WHICH), 0)
    mbarrier.arrive(k_free.index(1 - WHICH))
    mbarrier.wait(v_ready.index(1 - WHICH), 0)
    mbarrier.arrive(v_free.index(1 - WHICH))
    q = q_pages.index(WHICH)
    acc = gl.zeros([PAGE, HEAD_DIM], gl.float32, o_layout)
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(WHICH), 0)
    mbarrier.wait(v_ready.index(WHICH), 0)
    own_v = v_pages.index(3 * WHICH)
    if left < PAGE:
        # What lies past the chunk belongs to others: zero weight times their NaN would still be NaN.
        plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        row = gl.arange(0, PAGE, gl.SliceLayout(1, plain))
        kept = own_v.load(plain)
        own_v.store(gl.where((row < left)[:, None], kept, gl.zeros_like(kept)))
        fence_async_shared()
    acc, peak, total = _attend_diagonal(q, k_pages, v_pages, acc, log2_scale, WHICH)
    peak = gl.convert_layout(peak, rows_layout)
    total = gl.convert_layout(total, rows_layout)
    mbarrier.arrive(k_free.index(WHICH))
    mbarrier.arrive(v_free.index(WHICH))

    if num_blocks > 0:
        zero = gl.zeros([PAGE, BLOCK], gl.float32, s_layout)
        mbarrier.wait(k_ready.index(0), 1)
        logits = warpgroup_mma(q, k_slots.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        mbarrier.arrive(k_free.index(0))
        weights, decay, peak, total = _softmax(logits, peak, total, log2_scale)
        p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, o_layout, 2))
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
        for i in range(1, num_blocks):
            slot = i % STAGES
            last = (i - 1) % STAGES
            mbarrier.wait(k_ready.index(slot), ((i // STAGES) & 1) ^ 1)
            logits = warpgroup_mma(q, k_slots.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(last), (((i - 1) // STAGES) & 1) ^ 1)
            acc = warpgroup_mma(p, v_slots.index(last), acc, is_async=True)
            logits = warpgroup_mma_wait(1, deps=[logits])
            mbarrier.arrive(k_free.index(slot))
            weights, decay, peak, total = _softmax(logits, peak, total, log2_scale)
            # This wait never blocks; its branch keeps ptxas from moving the next one above the exponentials.
            mbarrier.wait(v_ready.index(last), (((i - 1) // STAGES) & 1) ^ 1)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_free.index(last))
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
            p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, o_layout, 2))
        last = (num_blocks - 1) % STAGES
        mbarrier.wait(v_ready.index(last), (((num_blocks - 1) // STAGES) & 1) ^ 1)
        acc = warpgroup_mma(p, v_slots.index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
    rows = gl.arange(0, PAGE, gl.SliceLayout(1, o_layout))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))
    at = out + (rows + WHICH * PAGE).to(gl.int64)[:, None] * out_token + columns[None, :]
    gl.store(at, acc.to(dtype), mask=(rows < left)[:, None])


@gluon.jit(do_not_specialize=["num_tiles", "blocks_row", "blocks_head"])
def _prefill_attention(
    queries, keys, values, key_pages, value_pages, key_blocks, value_blocks,
    out, out_token, out_head, scratch_head_rows,
    heads, tiles,
    blocks, blocks_row, blocks_head, counts, counts_row,
    num_tiles, log2_scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, LISTED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """See the module's docstring; tiles as `query_tiles` makes them."""
    program = gl.program_id(0)
    kv_head = gl.load(heads + program // (num_tiles * GROUP)).to(gl.int32)
    head = kv_head * GROUP + program % GROUP
    tile = tiles + 5 * (program % (num_tiles * GROUP) // GROUP)
    position = gl.load(tile)
    token = gl.load(tile + 1)
    tokens_left = gl.load(tile + 2)
    scratch = gl.load(tile + 3)
    row = gl.load(tile + 4).to(gl.int64)
    num_blocks = position // BLOCK
    if LISTED:
        num_blocks = gl.load(counts + row * counts_row + head) - 1
        blocks += row * blocks_row + head * blocks_head

    dtype: gl.constexpr = keys.dtype
    q_pages = gl.allocate_shared_memory(dtype, [2, PAGE, HEAD_DIM], keys.layout)
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_DIM], key_blocks.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_DIM], value_blocks.layout)
    k_pages = k_slots._reinterpret(dtype, [2 * STAGES, PAGE, HEAD_DIM], keys.layout)
    v_pages = v_slots._reinterpret(dtype, [2 * STAGES, PAGE, HEAD_DIM], values.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)

    descriptors = (queries, keys, values, key_pages, value_pages, key_blocks, value_blocks)
    buffers = (q_pages, k_pages, v_pages, k_slots, v_slots)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    tile_out = out + token.to(gl.int64) * out_token + head * out_head
    scratch_row = kv_head * scratch_head_rows + scratch
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    rest = (tile_out, out_token, tokens_left, num_blocks, log2_scale)
    source = (token, position, scratch_row, head, kv_head, blocks, num_blocks)
    gl.warp_specialize(
        [
            (_consume, (buffers, barriers, rest, first, HEAD_DIM, STAGES)),
            (_consume, (buffers, barriers, rest, second, HEAD_DIM, STAGES)),
            (_produce, (descriptors, buffers, barriers, source, HEAD_DIM, STAGES, LISTED)),
        ],
        [4, 1],
        [240, 24],
    )


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scratch_key: torch.Tensor) -> bool:
    """Whether this kernel takes these tensors: sm_90, 16 bits, head_dim 64 or 128, a token's heads side by side."""
    head_dim = query.shape[2]
    return (
        head_dim in (64, 128)
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) == (9, 0)
        and all(x.stride(1) == head_dim for x in (query, key, value))
        and scratch_key.stride(1) == head_dim
        and scratch_key.stride(0) % head_dim == 0
    )


def _rows(x: torch.Tensor, num_rows: int, row: int, stride: int, height: int) -> TensorDescriptor:
    """x seen as [num_rows, row] with this stride, read in tiles of `height` rows and head_dim columns."""
    tile = [height, x.shape[2]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor(x, [num_rows, row], [stride, 1], tile, gl.NVMMASharedLayout.get_default_for(tile, dtype))


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scratch_key: torch.Tensor,
    scratch_value: torch.Tensor,
    out: torch.Tensor,
    layer: LayerView,
    heads: torch.Tensor,
    tiles: torch.Tensor,
    lists: BlockLists | None,
) -> None:
    """Writes the retrieval heads' part of out, [T, Hq, D]; tiles as `query_tiles` makes them."""
    num_tokens, num_heads, head_dim = query.shape
    kv_heads = key.shape[1]
    head_rows = scratch_key.stride(0) // head_dim
    scratch_rows = (kv_heads - 1) * head_rows + scratch_key.shape[1]
    scratch = [
        _rows(x, scratch_rows, head_dim, head_dim, height)
        for height in (PAGE.value, BLOCK.value)
        for x in (scratch_key, scratch_value)
    ]
    _prefill_attention[(len(tiles) * heads.numel() * (num_heads // kv_heads),)](
        _rows(query, num_tokens, num_heads * head_dim, query.stride(0), PAGE.value),
        _rows(key, num_tokens, kv_heads * head_dim, key.stride(0), PAGE.value),
        _rows(value, num_tokens, kv_heads * head_dim, value.stride(0), PAGE.value),
        *scratch,
        out, out.stride(0), out.stride(1), head_rows,
        heads, tiles,
        *list_arguments(lists, tiles),
        len(tiles), layer.scale * LOG2_E,
        GROUP=num_heads // kv_heads, HEAD_DIM=head_dim, LISTED=lists is not None, STAGES=2,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
