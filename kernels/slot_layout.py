"""Where things lie inside one slot of a page. `engine/page_format.py` decides; kernels are told."""

from dataclasses import dataclass

import torch

NUM_LEVELS = {"float32": 1, "bf16": 1, "int8": 255, "k8v4": 255, "int4": 15}
"""Quantization steps of a key's range per kv_dtype. Float formats carry the range as plain statistics, hence one
step.
"""


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Byte offsets inside one slot: one (layer, KV head) pair's place in a page.

    With P = page_size, D = head_dim, G = P // logical_page_size groups, the parts are, in this order:

    - key codes at 0: [P, D] in the float format, or [P, D] uint8 for 8 bits, or [P/2, D] uint8 for 4 bits, where byte
      (t, d) holds token t in its low nibble and token t + P/2 in its high nibble (no interleave is needed to unpack);
    - key_min, key_step: fp16 [G, D] each. Decoded key = min + step * code; float formats decode to the stored value.
      The keys of a logical page lie within [min, min + step * key_levels] for every format (rounded outward), so
      centre = min + step * key_levels / 2 and radius = step * key_levels / 2 bound the scores;
    - value codes at value_codes, packed as the keys' are;
    - value_min, value_step: fp16 [P] each, per token (absent in float formats, where both offsets equal slot_bytes).

    Every offset is a multiple of 16 bytes.
    """

    kv_dtype: str
    head_dim: int
    page_size: int
    logical_page_size: int
    key_min: int
    key_step: int
    value_codes: int
    value_min: int
    value_step: int
    slot_bytes: int

    @property
    def num_groups(self) -> int:
        """Logical pages in a page."""
        return self.page_size // self.logical_page_size

    @property
    def key_levels(self) -> int:
        """Steps between a key range's ends: 255 (8 bits), 15 (4 bits), 1 (float formats)."""
        return NUM_LEVELS[self.kv_dtype]

    @property
    def key_bits(self) -> int:
        """Bits per stored key channel."""
        return {"float32": 32, "bf16": 16, "int8": 8, "k8v4": 8, "int4": 4}[self.kv_dtype]

    @property
    def value_bits(self) -> int:
        """Bits per stored value channel."""
        return {"float32": 32, "bf16": 16, "int8": 8, "k8v4": 4, "int4": 4}[self.kv_dtype]

    @property
    def float_dtype(self) -> torch.dtype | None:
        """The storage dtype of a float format; None for quantized formats."""
        return {"float32": torch.float32, "bf16": torch.bfloat16}.get(self.kv_dtype)


def make_slot_layout(kv_dtype: str, head_dim: int, logical_page_size: int = 32, page_size: int = 64) -> SlotLayout:
    """Packs a slot's parts one after the other, each aligned to 16 bytes.

    Raises ValueError for an unknown kv_dtype or a head_dim that is not a positive multiple of 8.
    """
    if kv_dtype not in NUM_LEVELS:
        raise ValueError(f"kv_dtype must be one of {', '.join(NUM_LEVELS)}, got {kv_dtype!r}")
    if head_dim <= 0 or head_dim % 8:
        raise ValueError(f"head_dim must be a positive multiple of 8, got {head_dim}")
    key_bits = {"float32": 32, "bf16": 16, "int8": 8, "k8v4": 8, "int4": 4}[kv_dtype]
    value_bits = 4 if kv_dtype == "k8v4" else key_bits
    statistics = page_size // logical_page_size * head_dim * 2
    scales = 0 if kv_dtype in ("float32", "bf16") else page_size * 2
    sizes = (
        page_size * head_dim * key_bits // 8,
        statistics,
        statistics,
        page_size * head_dim * value_bits // 8,
        scales,
        scales,
    )
    offsets = [0]
    for size in sizes:
        offsets.append((offsets[-1] + size + 15) // 16 * 16)
    return SlotLayout(kv_dtype, head_dim, page_size, logical_page_size, *offsets[1:])
