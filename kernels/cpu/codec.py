"""Slot bytes to numbers and back, in vectorised torch: the one CPU reading of `SlotLayout`."""

from collections.abc import Iterator

import torch

from ..slot_layout import SlotLayout

PART = 1 << 21
"""Decoded numbers at once, about: 8 MB stay in the caches, and in memory that the allocator has at hand."""


def _floor_half(x: torch.Tensor) -> torch.Tensor:
    """Largest fp16 that is at most x (float32)."""
    half = x.half()
    return torch.where(half.float() > x, torch.nextafter(half, torch.full_like(half, -torch.inf)), half)


def _ceil_half(x: torch.Tensor) -> torch.Tensor:
    """Smallest fp16 that is at least x (float32)."""
    half = x.half()
    return torch.where(half.float() < x, torch.nextafter(half, torch.full_like(half, torch.inf)), half)


def _quantize(x: torch.Tensor, dim: int, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (float32), fp16 minimum and step of x along dim; minimum + step * levels covers the maximum."""
    low, high = torch.aminmax(x, dim=dim, keepdim=True)
    minimum = _floor_half(low)
    step = _ceil_half((high - minimum.float()) / levels)
    divisor = torch.where(step == 0, 1.0, step.float())
    codes = ((x - minimum.float()) / divisor).add_(0.5).floor_().clamp_(0, levels)
    return codes, minimum.squeeze(dim), step.squeeze(dim)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """float codes [..., P, D] to uint8 bytes [..., bytes]; 4 bits put token t and t + P/2 in one byte."""
    codes = codes.to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, dim=-2)
        codes = low | (high << 4)
    return codes.flatten(-2)


def _unpack(data: torch.Tensor, bits: int, layout: SlotLayout, codes: torch.Tensor) -> torch.Tensor:
    """uint8 bytes [..., bytes] to codes, float32 [..., P, D]."""
    half = layout.page_size // 2
    if bits == 8:
        return codes.copy_(data.unflatten(-1, (layout.page_size, layout.head_dim)))
    data = data.unflatten(-1, (half, layout.head_dim))
    codes[..., :half, :] = data & 15
    codes[..., half:, :] = data >> 4
    return codes


def encode_slots(key: torch.Tensor, value: torch.Tensor, layout: SlotLayout) -> torch.Tensor:
    """key, value [..., P, D] in any float dtype to slots, uint8 [..., slot_bytes]."""
    lead = key.shape[:-2]
    key, value = key.float(), value.float()
    slots = torch.zeros(*lead, layout.slot_bytes, dtype=torch.uint8)
    grouped = key.unflatten(-2, (layout.num_groups, layout.logical_page_size))
    codes, minimum, step = _quantize(grouped, -2, layout.key_levels)
    for offset, statistic in ((layout.key_min, minimum), (layout.key_step, step)):
        data = statistic.flatten(-2).contiguous().view(torch.uint8)
        slots[..., offset : offset + data.shape[-1]] = data
    if layout.float_dtype is not None:
        for offset, x in ((0, key), (layout.value_codes, value)):
            data = x.to(layout.float_dtype).flatten(-2).contiguous().view(torch.uint8)
            slots[..., offset : offset + data.shape[-1]] = data
        return slots
    key_bytes = _pack(codes.flatten(-3, -2), layout.key_bits)
    slots[..., : key_bytes.shape[-1]] = key_bytes
    codes, minimum, step = _quantize(value, -1, 15 if layout.value_bits == 4 else 255)
    value_bytes = _pack(codes, layout.value_bits)
    slots[..., layout.value_codes : layout.value_codes + value_bytes.shape[-1]] = value_bytes
    for offset, statistic in ((layout.value_min, minimum), (layout.value_step, step)):
        slots[..., offset : offset + 2 * layout.page_size] = statistic.contiguous().view(torch.uint8)
    return slots


def _half(slots: torch.Tensor, offset: int, *shape: int) -> torch.Tensor:
    """The fp16 numbers at a byte offset of every slot [..., slot_bytes], as float32 [..., *shape]."""
    count = torch.Size(shape).numel()
    return slots[..., offset : offset + 2 * count].view(torch.float16).float().unflatten(-1, shape)


def decode_keys(slots: torch.Tensor, layout: SlotLayout, out: torch.Tensor | None = None) -> torch.Tensor:
    """Keys of slots uint8 [..., slot_bytes], float32 [..., P, D]; into `out` where that is given."""
    size = layout.page_size * layout.head_dim * layout.key_bits // 8
    out = _decoded(slots, layout) if out is None else out
    if layout.float_dtype is not None:
        return out.copy_(slots[..., :size].view(layout.float_dtype).unflatten(-1, out.shape[-2:]))
    _unpack(slots[..., :size], layout.key_bits, layout, out)
    minimum = _half(slots, layout.key_min, layout.num_groups, 1, layout.head_dim)
    step = _half(slots, layout.key_step, layout.num_groups, 1, layout.head_dim)
    grouped = out.unflatten(-2, (layout.num_groups, layout.logical_page_size))
    torch.addcmul(minimum, grouped, step, out=grouped)
    return out


def decode_values(slots: torch.Tensor, layout: SlotLayout, out: torch.Tensor | None = None) -> torch.Tensor:
    """Values (rotated) of slots uint8 [..., slot_bytes], float32 [..., P, D]; into `out` where that is given."""
    size = layout.page_size * layout.head_dim * layout.value_bits // 8
    data = slots[..., layout.value_codes : layout.value_codes + size]
    out = _decoded(slots, layout) if out is None else out
    if layout.float_dtype is not None:
        return out.copy_(data.view(layout.float_dtype).unflatten(-1, out.shape[-2:]))
    _unpack(data, layout.value_bits, layout, out)
    minimum = _half(slots, layout.value_min, layout.page_size, 1)
    step = _half(slots, layout.value_step, layout.page_size, 1)
    return torch.addcmul(minimum, out, step, out=out)


def _decoded(slots: torch.Tensor, layout: SlotLayout) -> torch.Tensor:
    return torch.empty(*slots.shape[:-1], layout.page_size, layout.head_dim)


def key_range(statistics: torch.Tensor, layout: SlotLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and radius, float32 [N, groups, D], from bytes [N, value_codes - key_min] that start at key_min."""
    minimum = _half(statistics, 0, layout.num_groups, layout.head_dim)
    step = _half(statistics, layout.key_step - layout.key_min, layout.num_groups, layout.head_dim)
    radius = step * (layout.key_levels / 2)
    return minimum + radius, radius


def gather_slots(pool: torch.Tensor, page_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Slots of pages, uint8 [N, slot_bytes] with N the broadcast elements of page_ids and slots (int64)."""
    index = (page_ids * pool.shape[1] + slots).flatten()
    return pool.view(-1, pool.shape[2]).index_select(0, index)


def split_batch(numbers: int, *inputs: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Inputs [B, ...] in parts of as many sequences as have PART decoded numbers; numbers: a sequence's, about."""
    per_part = max(PART // max(numbers, 1), 1)
    return zip(*(x.split(per_part) for x in inputs), strict=True)
