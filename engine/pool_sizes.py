"""How many pages and rows a worker has, from the settings and the memory that is there."""

from dataclasses import dataclass

import torch

from .config import PAGE_SIZE, EngineConfig
from .errors import SettingsError
from .page_format import PageFormat

DEFAULT_CPU_BYTES = 2 << 30
GPU_FRACTION = 0.8
SPARE_ROWS = 16
"""Rows beyond the batch, for prefilled requests whose tail is still leased."""


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """Units per pool: retrieval pages, streaming pages, tail rows."""

    retrieval_pages: int
    streaming_pages: int
    rows: int


def pool_sizes(
    config: EngineConfig, page_format: PageFormat, max_model_len: int, free_bytes: int | None = None
) -> PoolSizes:
    """Pool sizes for one worker. Raises SettingsError when not even one request of full length fits.

    free_bytes: of the GPU beside the weights; None asks it.

    Without explicit sizes a worker takes 2 GiB on a CPU and 80 % of what is free in its share of a GPU; streaming
    pages get what every row needs, plus a share that the prefix cache's resume points use (a window in every 1,024
    tokens).
    """
    sparsity, scheduler = config.sparsity, config.scheduler
    rows = scheduler.max_batch_size + SPARE_ROWS
    live = (sparsity.sink_size + sparsity.local_window) // PAGE_SIZE + 2
    needed = rows * live + 2 * scheduler.chunk_size // PAGE_SIZE + 2 * live
    retrieval_bytes = config.cache.retrieval_pool_bytes
    if retrieval_bytes is None:
        retrieval_bytes = DEFAULT_CPU_BYTES
        if config.device.startswith("cuda"):
            free_bytes = _free_bytes(config.gpu_share) if free_bytes is None else free_bytes
            retrieval_bytes = int(free_bytes * GPU_FRACTION) - rows * page_format.tail_row_bytes
            retrieval_bytes -= needed * page_format.streaming_page_bytes
            share = sparsity.local_window / PAGE_SIZE / 16 * page_format.streaming_page_bytes
            retrieval_bytes = int(retrieval_bytes / (1 + share / max(page_format.retrieval_page_bytes, 1)))
    retrieval = (
        retrieval_bytes // max(page_format.retrieval_page_bytes, 1) if page_format.num_retrieval_slots else 1 << 20
    )
    if retrieval < max_model_len // PAGE_SIZE + 2:
        wanted = (max_model_len // PAGE_SIZE + 2) * page_format.retrieval_page_bytes
        raise SettingsError(
            f"cache.retrieval_pool_bytes {retrieval_bytes} holds {retrieval} pages;"
            f" one request of {max_model_len} tokens needs {wanted} bytes"
        )
    streaming = 0
    if page_format.num_streaming_slots:
        streaming = needed + retrieval * sparsity.local_window // (16 * PAGE_SIZE)
        if config.cache.streaming_pool_bytes is not None:
            streaming = config.cache.streaming_pool_bytes // page_format.streaming_page_bytes
        if streaming < needed:
            raise SettingsError(
                f"cache.streaming_pool_bytes {config.cache.streaming_pool_bytes} holds {streaming} pages;"
                f" {rows} rows need {needed * page_format.streaming_page_bytes} bytes"
            )
    return PoolSizes(retrieval, streaming, rows)


def _free_bytes(share: float) -> int:
    """What this process may still take of a GPU when it may fill a share of it."""
    free, total = torch.cuda.mem_get_info()
    return max(min(free, int(total * share) - torch.cuda.memory_allocated()), 0)
