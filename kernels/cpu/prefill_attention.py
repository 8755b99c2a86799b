"""CPU path of `prefill_attention`: one unmasked product over the history, one masked product over the chunk itself."""

import torch

from ..views import BlockLists, LayerView, PrefillBatch

BLOCK = 128


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [H, M, D] (scaled) over key, value [H, N, D]; bias [M, N]; returns [H, M, D] and log-sum-exp [H, M]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], attn_mask=None if bias is None else bias[None, None], scale=1.0
    )
    return out[0], lse.reshape(query.shape[:2])


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Joins attention over disjoint key sets by their log-sum-exps."""
    if len(parts) == 1:
        return parts[0][0]
    (out_a, lse_a), (out_b, lse_b) = parts
    return torch.lerp(out_b, out_a, torch.sigmoid(lse_a - lse_b)[..., None])


def _chunk_bias(positions: torch.Tensor, keys: torch.Tensor, written: torch.Tensor, page: int) -> torch.Tensor:
    """0 where a query [M] sees a key [N], else -inf: written keys of its own page up to itself, decoded keys of
    earlier ones.
    """
    same_page = keys // page == positions[:, None] // page
    earlier_page = keys // page < positions[:, None] // page
    return torch.where(written, same_page & (keys <= positions[:, None]), earlier_page)


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
    """See `kernels.prefill_attention.prefill_attention`."""
    out = torch.empty_like(query)
    first, first_block = 0, 0
    for start, length, scratch in zip(batch.starts, batch.lengths, batch.scratch_offsets, strict=True):
        tokens = slice(first, first + length)
        history = slice(scratch, scratch + start + length // layer.layout.page_size * layer.layout.page_size)
        chunk = (query[tokens], key[tokens], value[tokens], scratch_key[:, history], scratch_value[:, history])
        for heads, is_streaming in ((layer.retrieval_heads, False), (layer.streaming_heads, True)):
            if heads.numel():
                lists = None if is_streaming else block_lists
                _attend_chunk(*chunk, out[tokens], start, heads, is_streaming, layer, lists, first_block)
        first += length
        first_block += (length + BLOCK - 1) // BLOCK
    return out


def _attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decoded_key: torch.Tensor,
    decoded_value: torch.Tensor,
    out: torch.Tensor,
    start: int,
    heads: torch.Tensor,
    is_streaming: bool,
    layer: LayerView,
    block_lists: BlockLists | None,
    first_block: int,
) -> None:
    """One request's chunk and one head class; decoded_key, decoded_value: [Hkv, positions from 0, D]."""
    length, _, head_dim = query.shape
    page, num_kv_heads = layer.layout.page_size, key.shape[1]
    grouped = query.view(length, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3).float() * layer.scale
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    if heads.numel() != num_kv_heads:
        grouped, key, value = grouped[heads], key[heads], value[heads]
        decoded_key, decoded_value = decoded_key[heads], decoded_value[heads]
    group_size = grouped.shape[1]
    merged_query = grouped.flatten(1, 2)
    positions = torch.arange(start, start + length)

    masked_from = start
    keep = torch.arange(decoded_key.shape[1])
    if is_streaming:
        masked_from = 0
        keep = keep[(keep < layer.sink_size) | (keep > start - layer.local_window)]
        decoded_key, decoded_value = decoded_key[:, keep], decoded_value[:, keep]
    elif block_lists is not None:
        masked_from = 0
    key_positions = torch.cat((keep[masked_from:], positions))
    written = torch.arange(key_positions.numel()) >= key_positions.numel() - length
    visible = _chunk_bias(positions, key_positions, written, page)
    if is_streaming:
        distance = positions[:, None] - key_positions
        visible &= (key_positions < layer.sink_size) | (distance < layer.local_window)
    bias = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    near_key = torch.cat((decoded_key[:, masked_from:].float(), key.float()), dim=1)
    near_value = torch.cat((decoded_value[:, masked_from:].float(), value.float()), dim=1)
    if block_lists is not None:
        attended = _attend_blocks(grouped, near_key, near_value, bias, key_positions, heads, block_lists, first_block)
    else:
        parts = [_flash(merged_query, near_key, near_value, bias.repeat(group_size, 1))]
        if masked_from:
            far_key, far_value = decoded_key[:, :masked_from].float(), decoded_value[:, :masked_from].float()
            parts.append(_flash(merged_query, far_key, far_value, None))
        attended = _merge(parts).unflatten(1, (group_size, length))
    target = out.view(length, num_kv_heads, group_size, head_dim)
    if heads.numel() == num_kv_heads:
        target.copy_(attended.permute(2, 0, 1, 3))
    else:
        target[:, heads] = attended.permute(2, 0, 1, 3).to(out.dtype)


def _attend_blocks(
    grouped: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    key_positions: torch.Tensor,
    heads: torch.Tensor,
    block_lists: BlockLists,
    first_block: int,
) -> torch.Tensor:
    """Dense arithmetic under the block lists' mask: right, not fast. grouped [H, G, M, D] to [H, G, M, D]."""
    num_heads, group_size, length, _ = grouped.shape
    num_blocks = (length + BLOCK - 1) // BLOCK
    query_heads = heads[:, None] * group_size + torch.arange(group_size)
    rows = slice(first_block, first_block + num_blocks)
    blocks, counts = block_lists.blocks[rows][:, query_heads].long(), block_lists.counts[rows][:, query_heads]
    width = max(int(key_positions.max()) // BLOCK, int(blocks.max())) + 1
    listed = torch.arange(blocks.shape[-1]) < counts[..., None]
    kept = torch.zeros(*counts.shape, width + 1, dtype=torch.bool)
    kept.scatter_(-1, blocks.masked_fill(~listed, width), True)
    kept = kept[..., key_positions // BLOCK].repeat_interleave(BLOCK, dim=0)[:length]
    mask = bias.masked_fill(~kept.permute(1, 2, 0, 3), -torch.inf)
    logits = grouped @ key[:, None].transpose(2, 3) + mask
    return logits.softmax(-1) @ value[:, None]
