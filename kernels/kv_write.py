"""`kv_write`: tokens into the tail, whole pages into the pools."""

import torch

from .cpu import kv_write as cpu
from .slot_layout import SlotLayout


def append_tail(
    key: torch.Tensor,
    value: torch.Tensor,
    tail_key: torch.Tensor,
    tail_value: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Writes one new token of each of B sequences into its tail row, at positions % P.

    key, value: [B, Hkv, D]. tail_key, tail_value: [rows, Hkv, P, D] (strided). rows, positions: int64 [B].
    """
    if key.is_cuda:
        from .gpu import kv_write as gpu

        gpu.append_tail(key, value, tail_key, tail_value, rows, positions)
    else:
        cpu.append_tail(key, value, tail_key, tail_value, rows, positions)


def write_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: torch.Tensor,
    pool: torch.Tensor,
    page_ids: torch.Tensor,
    slots: torch.Tensor,
    layout: SlotLayout,
    valid: torch.Tensor | None = None,
) -> None:
    """Quantizes N whole pages of H heads into one class's pool (DESIGN.md section 3: keys per channel, values per
    token).

    key, value: [N, P, heads of the source, D], any strides with the last one 1. heads: int64 [H], which of the
    source's heads. pool: uint8 [pages, slots, slot_bytes]. page_ids: int64 [N]. slots: int64 [H], where head h goes.
    valid: bool [N] on the device; pages whose entry is False are left alone (decode seals inside a CUDA graph).
    Codes are floor((x - min) / step + 0.5) in float32 with the fp16-rounded min (down) and step (up), clamped to the
    levels.
    """
    if key.is_cuda:
        from .gpu import kv_write as gpu

        gpu.write_pages(key, value, heads, pool, page_ids, slots, layout, valid)
    else:
        cpu.write_pages(key, value, heads, pool, page_ids, slots, layout, valid)
