"""Triton path of `prefill_blocks`: a matrix product over antidiagonal groups, then one program per row of the choice.

The first kernel computes, for each group of 16 queries and each key block, the log-sum-exp of the group's mean
antidiagonal logits (a product whose inner dimension is 16 * head_dim). The second turns the rows of a query block and
head into shares, keeps blocks by threshold or by count, and writes their list.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..cpu.prefill_blocks import BLOCK, STRIDE, kept_quota
from ..upload import upload
from ..views import BlockLists, LayerView, PrefillBatch
from .prefill_attention import LOG2_E

PER_BLOCK = BLOCK // STRIDE


@triton.jit(do_not_specialize=["num_tiles", "num_column_tiles", "scores_head", "scores_group"])
def _score_groups(
    query, query_token, query_head, key_groups, scores, scores_head, scores_group,
    heads, row_tiles, query_offsets, scratch_offsets, num_tiles, num_column_tiles, log2_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """key_groups: descriptor of the scratch as [Hkv, groups, STRIDE * D].

    row_tiles: int32 [n, 4] (request, first query group, the same in the batch, key groups before the last diagonal).
    """
    program = tl.program_id(0)
    head_index = program // (num_tiles * num_column_tiles * GROUP) * GROUP + program % GROUP
    kv_head = tl.load(heads + head_index // GROUP).to(tl.int32)
    tile = row_tiles + 4 * (program // (num_column_tiles * GROUP) % num_tiles)
    first_column = program // GROUP % num_column_tiles * BLOCK_N
    num_columns = tl.load(tile + 3)
    if first_column >= num_columns:
        return
    request = tl.load(tile)
    first_row = tl.load(tile + 1)
    first_token = tl.load(query_offsets + request)
    length = tl.load(query_offsets + request + 1) - first_token
    key_group = tl.load(scratch_offsets + request) // STRIDE + first_column

    rows = first_row + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + program % GROUP
    q_at = query + first_token.to(tl.int64) * query_token + head * query_head
    q_at += (rows * STRIDE)[:, None].to(tl.int64) * query_token + channels[None, :]
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(STRIDE * PARTS):
        s = i // PARTS
        channel = (i - s * PARTS) * BLOCK_D
        there = (rows * STRIDE + s < length)[:, None]
        if HEAD_DIM % BLOCK_D:
            there = there & (channels + channel < HEAD_DIM)[None, :]
        q = tl.load(q_at + s * query_token + channel, mask=there, other=0.0)
        column = (STRIDE - 1 - s) * HEAD_DIM + channel
        k = key_groups.load([kv_head, key_group, column]).reshape([BLOCK_N, BLOCK_D])
        logits = tl.dot(q, tl.trans(k), logits, input_precision=PRECISION)
    readable = first_column + tl.arange(0, BLOCK_N) < num_columns
    logits = tl.where(readable[None, :], logits * log2_scale, 0.0)
    logits = tl.reshape(logits, [BLOCK_M, BLOCK_N // PER_BLOCK, PER_BLOCK])
    peak = tl.max(logits, 2)
    score = peak + tl.log2(tl.sum(tl.exp2(logits - peak[:, :, None]), 2))

    blocks = first_column // PER_BLOCK + tl.arange(0, BLOCK_N // PER_BLOCK)
    groups = tl.load(tile + 2).to(tl.int64) + tl.arange(0, BLOCK_M)
    at = scores + head_index.to(tl.int64) * scores_head + groups[:, None] * scores_group + blocks[None, :]
    mask = (rows * STRIDE < length)[:, None] & (blocks * PER_BLOCK < num_columns)[None, :]
    tl.store(at, score, mask=mask)


@triton.jit(do_not_specialize=["scores_head", "scores_group", "blocks_row", "blocks_head", "sparse_from"])
def _keep_blocks(
    scores, scores_head, scores_group, blocks, blocks_row, blocks_head, counts, counts_row, heads, rows,
    sink_size, local_window, sparse_from, threshold,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BY_QUOTA: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """rows: int32 [query blocks, 3] (position, tokens, quota). WIDTH: power of two over the blocks."""
    row = tl.program_id(0).to(tl.int64)
    head_index = tl.program_id(1)
    head = tl.load(heads + head_index // GROUP) * GROUP + head_index % GROUP
    position = tl.load(rows + 3 * row)
    num_tokens = tl.load(rows + 3 * row + 1)
    diagonal = position // BLOCK
    block = tl.arange(0, WIDTH)
    before = block < diagonal
    kept = before
    if position >= sparse_from:
        share = tl.zeros([WIDTH], tl.float32)
        at = scores + head_index.to(tl.int64) * scores_head + row * (BLOCK // STRIDE) * scores_group
        for group in tl.static_range(BLOCK // STRIDE):
            there = before & (group * STRIDE < num_tokens)
            score = tl.load(at + group * scores_group + block, mask=there, other=-float("inf"))
            weight = tl.exp2(score - tl.maximum(tl.max(score, 0), -1e38))
            share += weight / tl.maximum(tl.sum(weight, 0), 1e-30)
        always = before & ((block * BLOCK < sink_size) | ((block + 1) * BLOCK > position - local_window + 1))
        if BY_QUOTA:
            quota = tl.load(rows + 3 * row + 2)
            bits = tl.where(always, float("inf"), share).to(tl.float32).to(tl.int32, bitcast=True)
            bits = tl.where(before, bits, -1)
            cut = 0
            for i in range(31):
                trial = cut | (1 << (30 - i))
                cut = tl.where(tl.sum((bits >= trial).to(tl.int32), 0) >= quota, trial, cut)
            above = bits > cut
            level = (bits == cut).to(tl.int32)
            left = quota - tl.sum(above.to(tl.int32), 0)
            kept = before & (above | ((level > 0) & (tl.cumsum(level, 0) <= left)))
        else:
            kept = before & ((share >= threshold * tl.max(share, 0)) | always)
    place = tl.cumsum(kept.to(tl.int32), 0)
    count = tl.sum(kept.to(tl.int32), 0)
    list_at = blocks + row * blocks_row + head * blocks_head
    tl.store(list_at + place - 1, block, mask=kept)
    tl.store(list_at + count, diagonal)
    tl.store(counts + row * counts_row + head, count + 1)


@lru_cache(maxsize=16)
def _tables(
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    sparse_from: int,
    block_m: int,
    quotas: tuple[int, ...],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`row_tiles` of the tiles that hold a row past sparse_from, and `rows`."""
    tiles, rows, first_group = [], [], 0
    for request, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        num_blocks = triton.cdiv(length, BLOCK)
        for group in range(0, num_blocks * PER_BLOCK, block_m):
            last = min(group + block_m, num_blocks * PER_BLOCK) // PER_BLOCK - 1
            if start + last * BLOCK >= max(sparse_from, 1):
                tiles.append((request, group, first_group + group, (start // BLOCK + last) * PER_BLOCK))
        rows += [(start + block * BLOCK, min(BLOCK, length - block * BLOCK)) for block in range(num_blocks)]
        first_group += num_blocks * PER_BLOCK
    table = [(*row, quota) for row, quota in zip(rows, quotas, strict=True)]
    return upload(tiles, torch.int32, device).view(-1, 4), upload(table, torch.int32, device)


def score_shape(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of the score product."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1}
    block_d = min(64, triton.next_power_of_2(head_dim))
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 3}


def prefill_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    scratch_key: torch.Tensor,
    layer: LayerView,
    batch: PrefillBatch,
    sparse_from: int,
    threshold: float | None,
    budget: float | None,
) -> BlockLists:
    """See `kernels.prefill_blocks.prefill_blocks`."""
    num_blocks = [triton.cdiv(length, BLOCK) for length in batch.lengths]
    width = max((start // BLOCK + blocks for start, blocks in zip(batch.starts, num_blocks, strict=True)), default=0)
    num_heads, head_dim = query.shape[1:]
    group, num_rows = num_heads // scratch_key.shape[0], sum(num_blocks)
    blocks = torch.empty(num_rows, num_heads, width, dtype=torch.int32, device=query.device)
    counts = torch.empty(num_rows, num_heads, dtype=torch.int32, device=query.device)
    heads = layer.retrieval_heads
    if not num_rows or not heads.numel():
        return BlockLists(blocks, counts)
    positions = [s + b * BLOCK for s, n in zip(batch.starts, num_blocks, strict=True) for b in range(n)]
    quotas = tuple(0 if budget is None else kept_quota(position, layer, budget) for position in positions)
    shape = score_shape(head_dim, query.dtype)
    row_tiles, rows = _tables(batch.starts, batch.lengths, sparse_from, shape["BLOCK_M"], quotas, query.device)
    scores = torch.empty(heads.numel() * group, num_rows * PER_BLOCK, width, dtype=torch.float32, device=query.device)
    num_column_tiles = triton.cdiv(width * PER_BLOCK, shape["BLOCK_N"])
    num_key_groups = scratch_key.shape[1] // STRIDE
    key_groups = scratch_key[:, : num_key_groups * STRIDE].view(-1, num_key_groups, STRIDE * head_dim)
    if len(row_tiles):
        _score_groups[(heads.numel() * group * len(row_tiles) * num_column_tiles,)](
            query, query.stride(0), query.stride(1),
            TensorDescriptor.from_tensor(key_groups, [1, shape["BLOCK_N"], shape["BLOCK_D"]]),
            scores, scores.stride(0), scores.stride(1),
            heads, row_tiles, batch.query_offsets_device, batch.scratch_offsets_device,
            len(row_tiles), num_column_tiles, layer.scale / STRIDE * LOG2_E,
            GROUP=group, HEAD_DIM=head_dim, PARTS=triton.cdiv(head_dim, shape["BLOCK_D"]),
            STRIDE=STRIDE, PER_BLOCK=PER_BLOCK, PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee", **shape,
        )  # fmt: skip
    padded = max(16, triton.next_power_of_2(width))
    _keep_blocks[(num_rows, heads.numel() * group)](
        scores, scores.stride(0), scores.stride(1),
        blocks, blocks.stride(0), blocks.stride(1), counts, counts.stride(0),
        heads, rows, layer.sink_size, layer.local_window, sparse_from, 0.0 if threshold is None else threshold,
        GROUP=group, WIDTH=padded, BY_QUOTA=budget is not None, BLOCK=BLOCK, STRIDE=STRIDE,
        num_warps=1 if padded <= 1024 else 4 if padded <= 4096 else 8,
    )  # fmt: skip
    return BlockLists(blocks, counts)
