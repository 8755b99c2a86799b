"""Attention over one whole sequence in plain floats, without pages: the fast path on which head profiles are searched.

It computes what an engine with float32 pages and no page selection computes, per KV head dense or streaming.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

BLOCK = 256
"""Queries that a streaming head attends with at once: larger wastes masked keys, smaller wastes calls."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What streaming heads see: the first sink_size tokens and the last local_window, in tokens."""

    sink_size: int
    local_window: int


@dataclass(slots=True)
class WholeSequence:
    """The model's `attend` callback for a sequence from its first token, or for a continuation of one.

    streaming: [layers][KV heads]. history: per layer, keys and values [T, Hkv, D] of the tokens before, kept when keep
    is set.
    """

    streaming: Sequence[Sequence[bool]]
    reach: Reach
    scale: float
    keep: bool = False
    history: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One layer: query [T, Hq, D], key and value [T, Hkv, D] of the new tokens; returns [T, Hq, D]."""
        if layer in self.history:
            key = torch.cat((self.history[layer][0], key))
            value = torch.cat((self.history[layer][1], value))
        if self.keep:
            self.history[layer] = (key, value)
        flags = torch.tensor(self.streaming[layer])
        if not flags.any():
            return dense_attention(query, key, value, self.scale)
        group_size = query.shape[1] // key.shape[1]
        shape = (query.shape[0], key.shape[1], group_size, query.shape[2])
        grouped, out = query.reshape(shape), query.new_empty(shape)
        for heads, is_streaming in ((flags.nonzero()[:, 0], True), ((~flags).nonzero()[:, 0], False)):
            if heads.numel():
                part = grouped[:, heads].flatten(1, 2), key[:, heads], value[:, heads]
                if is_streaming:
                    attended = streaming_attention(*part, self.scale, self.reach)
                else:
                    attended = dense_attention(*part, self.scale)
                out[:, heads] = attended.view(-1, heads.numel(), *shape[2:])
        return out.flatten(1, 2)

    def continuation(self, streaming: Sequence[Sequence[bool]] | None = None) -> "WholeSequence":
        """An attend callback for tokens after this sequence's, which leaves this one as it is.

        streaming: of the new tokens, where that differs.
        """
        return WholeSequence(streaming or self.streaming, self.reach, self.scale, history=self.history)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of the last M of N positions: query [M, Hq, D] over key, value [N, Hkv, D] to [M, Hq, D]."""
    num_queries, num_keys, group_size = query.shape[0], key.shape[0], query.shape[1] // key.shape[1]
    key, value = (x.transpose(0, 1).repeat_interleave(group_size, 0)[None] for x in (key, value))
    query = query.transpose(0, 1)[None]
    if num_queries == num_keys:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:
        token = torch.arange(num_keys, device=query.device)
        seen = token <= token[num_keys - num_queries :, None]
        out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    return out[0].transpose(0, 1)


def streaming_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, reach: Reach) -> Tensor:
    """As dense_attention, of heads that see sink and window only: linear in the length, BLOCK queries at a time."""
    num_queries, num_keys, group_size = query.shape[0], key.shape[0], query.shape[1] // key.shape[1]
    device, first = query.device, num_keys - num_queries
    num_blocks = -(-num_queries // BLOCK)
    query = pad(query, (0, 0, 0, 0, 0, num_blocks * BLOCK - num_queries)).view(num_blocks, BLOCK, *query.shape[1:])
    position = first + torch.arange(num_blocks * BLOCK, device=device).view(num_blocks, BLOCK, 1)
    near = position[:, :1, 0] - reach.local_window + 1 + torch.arange(BLOCK + reach.local_window - 1, device=device)
    sink = torch.arange(min(reach.sink_size, num_keys), device=device).expand(num_blocks, -1)
    # a token of the sink that is also near is listed once, as sink
    token = torch.cat((sink, near.masked_fill((near < reach.sink_size) | (near >= num_keys), num_keys)), 1)[:, None]
    seen = (token <= position) & ((token < reach.sink_size) | (position - token < reach.local_window))
    seen |= position >= num_keys  # padding must see something
    listed = token[:, 0].clamp(max=num_keys - 1)
    keys, values = (x[listed].transpose(1, 2).repeat_interleave(group_size, 1) for x in (key, value))
    out = scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=scale)
    return out.transpose(1, 2).flatten(0, 1)[:num_queries]
