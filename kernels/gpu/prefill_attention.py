"""Triton path of `prefill_attention`: whole earlier blocks without masks, masks only where they bind.

One program computes BLOCK_M query rows of one query head. It walks three kinds of key blocks:

- blocks before the diagonal block, from the scratch (every token is on an earlier page, hence decoded): without a mask
  for retrieval heads; under the streaming mask, sink and window pages only, for streaming heads;
- the first page of the diagonal block as decoded, which only rows on the second page see;
- the chunk's own tokens as written: causal, and only on the row's own page.

Rows go KV head by KV head, whose keys and values then stay in the L2, and longest first over the whole batch, so the
chip drains evenly without a persistent loop. On sm_90 the retrieval heads of common shapes take
`prefill_attention_hopper` instead.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..upload import upload
from ..views import BlockLists, LayerView, PrefillBatch

LOG2_E = 1.4426950408889634
BLOCK = tl.constexpr(128)
PAGE = tl.constexpr(64)


@triton.jit
def _load(
    source, head, row, head_stride, row_stride, end,
    HEIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows row .. row + HEIGHT of a head, [HEIGHT, BLOCK_D], through a descriptor or a pointer to [heads, rows, D]."""
    if TMA:
        tile = source.load([head, row, 0]).reshape([HEIGHT, BLOCK_D])
    else:
        rows = row + tl.arange(0, HEIGHT)
        channels = tl.arange(0, BLOCK_D)
        at = source + head.to(tl.int64) * head_stride + rows[:, None].to(tl.int64) * row_stride + channels[None, :]
        tile = tl.load(at, mask=(rows < end)[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def _accumulate(q, k, v, visible, acc, peak, total, log2_scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One online-softmax step; peak: largest logit so far in log2 units, total: sum of exp2(logit - peak)."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        logits = tl.where(visible, logits, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1) * log2_scale)
    weights = tl.exp2(logits * log2_scale - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit(do_not_specialize=["num_tiles", "blocks_row", "blocks_head", "s_end"])
def _prefill_attention(
    query, query_token, query_head,
    key_edges, value_edges, decoded_key_edges, decoded_value_edges, decoded_keys, decoded_values,
    k_head, k_token, v_head, v_token, s_head, s_token, s_end,
    out, out_token, out_head,
    heads, tiles,
    blocks, blocks_row, blocks_head, counts, counts_row,
    num_tiles, sink_size, local_window, log2_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr, STREAMING: tl.constexpr, LISTED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module's docstring; tiles as `query_tiles` makes them."""
    program = tl.program_id(0)
    kv_head = tl.load(heads + program // (num_tiles * (BLOCK // BLOCK_M) * GROUP)).to(tl.int32)
    head = kv_head * GROUP + program % GROUP
    tile = tiles + 5 * (program // GROUP % (num_tiles * (BLOCK // BLOCK_M)) // (BLOCK // BLOCK_M))
    block_position = tl.load(tile)
    first_token = tl.load(tile + 1)
    length = tl.load(tile + 2)
    scratch = tl.load(tile + 3)
    first_row = program // GROUP % (BLOCK // BLOCK_M) * BLOCK_M
    if first_row >= length:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    position = block_position + rows
    edge = tl.arange(0, EDGE)
    channels = tl.arange(0, BLOCK_D)
    wide = (rows < length)[:, None] & (channels < HEAD_DIM)[None, :]
    query += (first_token + first_row).to(tl.int64) * query_token + head * query_head
    q_at = query + tl.arange(0, BLOCK_M)[:, None] * query_token + channels[None, :]
    q = tl.load(q_at, mask=wide, other=0.0)

    peak = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if STREAMING:
        first_position = block_position + first_row
        diagonal_page = block_position // PAGE
        sink_pages = tl.minimum((sink_size + PAGE - 1) // PAGE, diagonal_page)
        window_page = tl.maximum(tl.maximum(first_position - local_window + 1, 0) // PAGE, sink_pages)
        for i in tl.range((sink_pages + tl.maximum(diagonal_page - window_page, 0)) * (PAGE // EDGE)):
            column = i * EDGE + edge
            column += tl.where(i * EDGE < sink_pages * PAGE, 0, (window_page - sink_pages) * PAGE)
            at = scratch + i * EDGE
            at += tl.where(i * EDGE < sink_pages * PAGE, 0, (window_page - sink_pages) * PAGE)
            k = _load(decoded_key_edges, kv_head, at, s_head, s_token, s_end, EDGE, HEAD_DIM, BLOCK_D, TMA)
            v = _load(decoded_value_edges, kv_head, at, s_head, s_token, s_end, EDGE, HEAD_DIM, BLOCK_D, TMA)
            visible = (column[None, :] < sink_size) | (position[:, None] - column[None, :] < local_window)
            acc, peak, total = _accumulate(q, k, v, visible, acc, peak, total, log2_scale, True, PRECISION)
    else:
        PARTS: tl.constexpr = BLOCK // BLOCK_N
        row = tl.load(tile + 4).to(tl.int64)
        num_blocks = block_position // BLOCK
        if LISTED:
            num_blocks = tl.load(counts + row * counts_row + head) - 1
            blocks += row * blocks_row + head * blocks_head
        for i in tl.range(num_blocks * PARTS):
            at = scratch + i * BLOCK_N
            if LISTED:
                at += (tl.load(blocks + i // PARTS) - i // PARTS) * BLOCK
            k = _load(decoded_keys, kv_head, at, s_head, s_token, s_end, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
            v = _load(decoded_values, kv_head, at, s_head, s_token, s_end, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
            acc, peak, total = _accumulate(q, k, v, True, acc, peak, total, log2_scale, False, PRECISION)

    last_row = tl.minimum(first_row + BLOCK_M, length)
    decoded_edges = tl.where(last_row > PAGE, PAGE // EDGE, 0)
    for i in tl.range(decoded_edges, num_stages=1):
        at = block_position + i * EDGE
        k = _load(decoded_key_edges, kv_head, scratch + at, s_head, s_token, s_end, EDGE, HEAD_DIM, BLOCK_D, TMA)
        v = _load(decoded_value_edges, kv_head, scratch + at, s_head, s_token, s_end, EDGE, HEAD_DIM, BLOCK_D, TMA)
        column = at + edge
        visible = rows[:, None] >= PAGE
        if STREAMING:
            visible &= (column[None, :] < sink_size) | (position[:, None] - column[None, :] < local_window)
        acc, peak, total = _accumulate(q, k, v, visible, acc, peak, total, log2_scale, True, PRECISION)
    end = first_token + length
    for at in tl.range(first_row // PAGE * PAGE, last_row, EDGE, num_stages=1):
        k = _load(key_edges, kv_head, first_token + at, k_head, k_token, end, EDGE, HEAD_DIM, BLOCK_D, TMA)
        v = _load(value_edges, kv_head, first_token + at, v_head, v_token, end, EDGE, HEAD_DIM, BLOCK_D, TMA)
        token = at + edge
        v = tl.where((token < length)[:, None], v, 0.0)
        visible = (token[None, :] <= rows[:, None]) & (rows[:, None] // PAGE == token[None, :] // PAGE)
        if STREAMING:
            column = block_position + token
            visible &= (column[None, :] < sink_size) | (position[:, None] - column[None, :] < local_window)
        acc, peak, total = _accumulate(q, k, v, visible, acc, peak, total, log2_scale, True, PRECISION)

    out += (first_token + first_row).to(tl.int64) * out_token + head * out_head
    out_at = out + tl.arange(0, BLOCK_M)[:, None] * out_token + channels[None, :]
    total = tl.where(rows < length, total, 1.0)
    tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=wide)


def query_tiles(batch: PrefillBatch, device: torch.device) -> torch.Tensor:
    """The batch's query blocks, longest history first, int32 [n, 5].

    Each is (its first position, its first token in the batch, the chunk's tokens from there on, where the scratch holds
    its request's position 0, its number among the batch's query blocks).
    """
    return _query_tiles(batch.starts, batch.lengths, batch.scratch_offsets, device)


@lru_cache(maxsize=16)
def _query_tiles(
    starts: tuple[int, ...], lengths: tuple[int, ...], scratch_offsets: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    tiles: list[tuple[int, ...]] = []
    first = 0
    for start, length, scratch in zip(starts, lengths, scratch_offsets, strict=True):
        for row in range(0, length, BLOCK.value):
            tiles.append((start + row, first + row, length - row, scratch, len(tiles)))
        first += length
    tiles.sort(key=lambda tile: -tile[0])
    return upload(tiles, torch.int32, device).view(-1, 5)


def list_arguments(lists: BlockLists | None, unused: torch.Tensor) -> tuple[torch.Tensor, int, int, torch.Tensor, int]:
    """blocks and its strides, counts and its stride; any int32 tensor stands in where there are no lists."""
    if lists is None:
        return unused, 0, 0, unused, 0
    return lists.blocks, lists.blocks.stride(0), lists.blocks.stride(1), lists.counts, lists.counts.stride(0)


def tile_shape(head_dim: int, dtype: torch.dtype, streaming: bool, capability: int) -> dict[str, int]:
    """Tiles and launch options; for bf16 on sm_90 as measured on an H200 (benchmarks/results/LOG.md)."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64 if head_dim <= 128 else 32, "BLOCK_N": 32, "EDGE": 32, "num_warps": 4, "num_stages": 1}
    if capability < 9:
        return {"BLOCK_M": 64, "BLOCK_N": 64 if head_dim <= 128 else 32, "EDGE": 32, "num_warps": 4, "num_stages": 2}
    if head_dim > 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "EDGE": 16, "num_warps": 8, "num_stages": 2}
    if streaming:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "EDGE": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "EDGE": 64, "num_warps": 8, "num_stages": 2}


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scratch_key: torch.Tensor,
    scratch_value: torch.Tensor,
    layer: LayerView,
    batch: PrefillBatch,
    block_lists: BlockLists | None,
) -> torch.Tensor:
    """See `kernels.prefill_attention.prefill_attention`; one launch for each head class that has heads.

    Raises ValueError when scratch_key and scratch_value differ in strides.
    """
    if scratch_key.stride() != scratch_value.stride():
        raise ValueError(f"scratch strides must be equal, got {scratch_key.stride()} and {scratch_value.stride()}")
    out = torch.empty_like(query)
    tiles = query_tiles(batch, query.device)
    tensors = (query, key, value, scratch_key, scratch_value, out, layer)
    if layer.retrieval_heads.numel() and len(tiles):
        hopper = _hopper(query, key, value, scratch_key)
        if hopper is not None:
            hopper(*tensors, layer.retrieval_heads, tiles, block_lists)
        else:
            launch(*tensors, layer.retrieval_heads, tiles, block_lists, streaming=False)
    if layer.streaming_heads.numel() and len(tiles):
        launch(*tensors, layer.streaming_heads, tiles, None, streaming=True)
    return out


def _hopper(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scratch_key: torch.Tensor
) -> Callable[..., None] | None:
    """The sm_90 kernel's launch where it takes these tensors, else None."""
    if not query.is_cuda:
        return None
    from . import prefill_attention_hopper as hopper

    return hopper.launch if hopper.supports(query, key, value, scratch_key) else None


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
    streaming: bool,
    capability: int | None = None,
) -> None:
    """Every query tile of one head class, by the portable kernel.

    capability: major compute capability to build for, the tensors' own by default; before 9, pointers instead of TMA.
    """
    if capability is None:
        capability = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9
    head_dim, group = query.shape[2], query.shape[1] // key.shape[1]
    shape = tile_shape(head_dim, query.dtype, streaming, capability)
    block_d = max(16, triton.next_power_of_2(head_dim))
    chunk, scratch = (key.transpose(0, 1), value.transpose(0, 1)), (scratch_key, scratch_value)
    heights = [(x, shape["EDGE"]) for x in (*chunk, *scratch)] + [(x, shape["BLOCK_N"]) for x in scratch]
    descriptors = capability >= 9
    sources = [TensorDescriptor.from_tensor(x, [1, n, block_d]) if descriptors else x for x, n in heights]
    _prefill_attention[(len(tiles) * heads.numel() * group * (BLOCK.value // shape["BLOCK_M"]),)](
        query, query.stride(0), query.stride(1),
        *sources,
        key.stride(1), key.stride(0), value.stride(1), value.stride(0),
        scratch_key.stride(0), scratch_key.stride(1), scratch_key.shape[1],
        out, out.stride(0), out.stride(1),
        heads, tiles,
        *list_arguments(lists, tiles),
        len(tiles), layer.sink_size, layer.local_window, layer.scale * LOG2_E,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, STREAMING=streaming, LISTED=lists is not None,
        TMA=descriptors, PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee", **shape,
    )  # fmt: skip
