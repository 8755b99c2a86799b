"""What a slot's bytes mean, in float64 and one number after the other where that is clearest (DESIGN.md section 3)."""

import torch

from ..slot_layout import SlotLayout


def half_below(x: float) -> float:
    """Largest fp16 number that is at most x."""
    half = torch.tensor(x, dtype=torch.float64).half()
    if half.double() > x:
        half = torch.nextafter(half, torch.tensor(-torch.inf, dtype=torch.half))
    return float(half)


def half_above(x: float) -> float:
    """Smallest fp16 number that is at least x."""
    return -half_below(-x)


def quantize(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, float, float]:
    """Codes (int64), minimum and step of one run of numbers (1-D)."""
    x = x.double()
    minimum = half_below(float(x.min()))
    step = half_above((float(x.max()) - minimum) / levels)
    codes = torch.floor((x - minimum) / (step or 1.0) + 0.5).clamp(0, levels)
    return codes.long(), minimum, step


def _put(slot: torch.Tensor, offset: int, x: torch.Tensor) -> None:
    data = x.contiguous().flatten().view(torch.uint8)
    slot[offset : offset + data.numel()] = data


def _put_codes(slot: torch.Tensor, offset: int, codes: torch.Tensor, bits: int) -> None:
    if bits == 4:
        half = codes.shape[0] // 2
        codes = codes[:half] + 16 * codes[half:]
    _put(slot, offset, codes.to(torch.uint8))


def encode_slot(key: torch.Tensor, value: torch.Tensor, layout: SlotLayout) -> torch.Tensor:
    """One slot's bytes, uint8 [slot_bytes], from key and value [P, D]."""
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    shape = (layout.num_groups, layout.head_dim)
    minima, steps = torch.empty(shape, dtype=torch.half), torch.empty(shape, dtype=torch.half)
    codes = torch.empty(layout.page_size, layout.head_dim, dtype=torch.int64)
    for group in range(layout.num_groups):
        tokens = slice(group * layout.logical_page_size, (group + 1) * layout.logical_page_size)
        for channel in range(layout.head_dim):
            codes[tokens, channel], minima[group, channel], steps[group, channel] = quantize(
                key[tokens, channel], layout.key_levels
            )
    _put(slot, layout.key_min, minima)
    _put(slot, layout.key_step, steps)
    if layout.float_dtype is not None:
        _put(slot, 0, key.to(layout.float_dtype))
        _put(slot, layout.value_codes, value.to(layout.float_dtype))
        return slot
    _put_codes(slot, 0, codes, layout.key_bits)
    minima, steps = torch.empty(layout.page_size, dtype=torch.half), torch.empty(layout.page_size, dtype=torch.half)
    for token in range(layout.page_size):
        codes[token], minima[token], steps[token] = quantize(value[token], 2**layout.value_bits - 1)
    _put_codes(slot, layout.value_codes, codes, layout.value_bits)
    _put(slot, layout.value_min, minima)
    _put(slot, layout.value_step, steps)
    return slot


def _get(slot: torch.Tensor, offset: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return slot[offset : offset + size].clone().view(dtype).double().reshape(shape)


def codes_of(slot: torch.Tensor, offset: int, bits: int, layout: SlotLayout) -> torch.Tensor:
    """Codes stored at an offset, float64 [P, D]."""
    if bits == 8:
        return _get(slot, offset, torch.uint8, layout.page_size, layout.head_dim)
    packed = _get(slot, offset, torch.uint8, layout.page_size // 2, layout.head_dim)
    return torch.cat((packed % 16, packed // 16))


def key_range(slot: torch.Tensor, layout: SlotLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and radius of each logical page's keys, float64 [groups, D]."""
    minimum = _get(slot, layout.key_min, torch.half, layout.num_groups, layout.head_dim)
    radius = _get(slot, layout.key_step, torch.half, layout.num_groups, layout.head_dim) * layout.key_levels / 2
    return minimum + radius, radius


def decode_slot(slot: torch.Tensor, layout: SlotLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a slot, float64 [P, D] each."""
    shape = (layout.page_size, layout.head_dim)
    if layout.float_dtype is not None:
        return _get(slot, 0, layout.float_dtype, *shape), _get(slot, layout.value_codes, layout.float_dtype, *shape)
    minimum = _get(slot, layout.key_min, torch.half, layout.num_groups, layout.head_dim)
    step = _get(slot, layout.key_step, torch.half, layout.num_groups, layout.head_dim)
    minimum, step = (x.repeat_interleave(layout.logical_page_size, 0) for x in (minimum, step))
    key = minimum + step * codes_of(slot, 0, layout.key_bits, layout)
    minimum = _get(slot, layout.value_min, torch.half, layout.page_size, 1)
    step = _get(slot, layout.value_step, torch.half, layout.page_size, 1)
    return key, minimum + step * codes_of(slot, layout.value_codes, layout.value_bits, layout)
