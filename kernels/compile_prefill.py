"""What `compile_check` compiles of prefill: attention and the block estimator at 8B models' shapes."""

import torch

from .compile_check import Case
from .gpu import prefill_attention as portable
from .gpu import prefill_attention_hopper as hopper
from .gpu import prefill_blocks as estimator
from .slot_layout import make_slot_layout
from .views import BlockLists, LayerView, PrefillBatch

START, LENGTH, HEADS, KV_HEADS = 1024, 1280, 32, 8
EVERYWHERE = (80, 90, 100)


def _layer(head_dim: int) -> LayerView:
    heads, nothing = torch.arange(KV_HEADS), torch.empty(0)
    streaming = heads >= KV_HEADS // 2
    retrieval = heads[~streaming]
    return LayerView(
        make_slot_layout("int4", head_dim), nothing, nothing, heads.int(), streaming, retrieval, heads[streaming],
        0, 0, nothing, nothing, 128, 256, head_dim**-0.5,
    )  # fmt: skip


def _batch() -> PrefillBatch:
    return PrefillBatch.create([START], [LENGTH], "cpu")


def _tensors(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    query = torch.empty(LENGTH, HEADS, head_dim, dtype=dtype)
    chunk = torch.empty(2, LENGTH, KV_HEADS, head_dim, dtype=dtype)
    scratch = torch.empty(2, KV_HEADS, _batch().scratch_tokens, head_dim, dtype=dtype)
    return query, *chunk, *scratch


def _lists() -> BlockLists:
    rows, width = LENGTH // 128, (START + LENGTH) // 128
    blocks = torch.empty(rows, HEADS, width, dtype=torch.int32)
    return BlockLists(blocks, torch.empty(rows, HEADS, dtype=torch.int32))


def attention(
    head_dim: int, kernel: str, lists: bool = False, dtype: torch.dtype = torch.bfloat16, capability: int = 9
) -> None:
    """Launches one kernel of `prefill_attention`: "hopper", "portable" or "streaming"."""
    layer, tensors = _layer(head_dim), _tensors(head_dim, dtype)
    tiles = portable.query_tiles(_batch(), tensors[0].device)
    heads = layer.streaming_heads if kernel == "streaming" else layer.retrieval_heads
    arguments = (*tensors, torch.empty_like(tensors[0]), layer, heads, tiles, _lists() if lists else None)
    if kernel == "hopper":
        hopper.launch(*arguments)
    else:
        portable.launch(*arguments, streaming=kernel == "streaming", capability=capability)


def blocks(head_dim: int, threshold: float | None, budget: float | None) -> None:
    """Launches `prefill_blocks`."""
    query, key, _, scratch_key, _ = _tensors(head_dim, torch.bfloat16)
    estimator.prefill_blocks(query, key, scratch_key, _layer(head_dim), _batch(), 0, threshold, budget)


WGMMA = ("_prefill_attention", "_score_groups")

PREFILL_CASES = [
    Case("prefill 128", lambda: attention(128, "hopper"), WGMMA),
    Case("prefill 128, block lists", lambda: attention(128, "hopper", lists=True), WGMMA),
    Case("prefill 64", lambda: attention(64, "hopper"), WGMMA),
    Case("prefill 64 fp16, block lists", lambda: attention(64, "hopper", lists=True, dtype=torch.float16), WGMMA),
    Case("prefill 128, portable", lambda: attention(128, "portable", lists=True), WGMMA, (90, 100)),
    Case("prefill 128, before sm_90", lambda: attention(128, "portable", lists=True, capability=8), (), (80,)),
    Case("prefill 80, portable", lambda: attention(80, "portable"), WGMMA),
    Case("prefill 256, portable", lambda: attention(256, "portable", lists=True), WGMMA),
    Case("prefill 128, streaming", lambda: attention(128, "streaming"), WGMMA),
    Case("streaming 128, before sm_90", lambda: attention(128, "streaming", capability=8), (), (80,)),
    Case("prefill 256, streaming", lambda: attention(256, "streaming"), WGMMA),
    Case("prefill_blocks 128, threshold", lambda: blocks(128, 0.1, None), WGMMA),
    Case("prefill_blocks 80, budget", lambda: blocks(80, None, 0.25), WGMMA, EVERYWHERE),
]
