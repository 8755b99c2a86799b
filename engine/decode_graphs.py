"""Decode steps as CUDA graphs: one per size of batch and context, captured when first needed, replayed from then on.

A graph holds everything from token ids to logits, page selection and its reuse included: which sequences select is a
flag on the device. Batches are padded to powers of two, and so is the longest context that a graph's grids cover.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from .attention import DecodeStep
from .config import SparsityConfig
from .decode_inputs import NUM_FIELDS, pack, unpack
from .kv_cache import KVCache
from .model import Model
from .page_tables import PageTables
from .sequence import Sequence

_MIN_PAGES = 128


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    packed: torch.Tensor
    logits: torch.Tensor


class DecodeGraphs:
    """The captured decode steps of one engine. spare_row: a tail row that no sequence ever gets."""

    def __init__(self, model: Model, cache: KVCache, tables: PageTables, spare_row: int) -> None:
        self._model, self._cache, self._tables, self._spare_row = model, cache, tables, spare_row
        self._captured: dict[tuple[int, int, bool, SparsityConfig], _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, sequences: SequenceOf[Sequence], sparsity: SparsityConfig) -> torch.Tensor:
        """Logits float32 [sequences, vocabulary] after each one's newest token, valid until the next call."""
        size = 1 << (len(sequences) - 1).bit_length()
        width = max(s.own_page + 1 for s in sequences)
        width = min(max(_MIN_PAGES, 1 << (width - 1).bit_length()), self._tables.retrieval.shape[1])
        packed = pack(sequences, sparsity, size, self._spare_row)
        key = (size, width, bool(packed[4].any()), sparsity)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(packed, *key)
        captured.packed.copy_(packed.pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.logits[: len(sequences)]

    def _capture(
        self, packed: torch.Tensor, size: int, width: int, any_reselect: bool, sparsity: SparsityConfig
    ) -> _Captured:
        static = torch.zeros(NUM_FIELDS, size, dtype=torch.int64, device=self._cache.device)
        static[1] = self._spare_row  # warm up and capture on rows that nobody reads
        static[3] = 1
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(static, width, any_reselect, sparsity)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NIXL's thread may move pages meanwhile
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = self._step(static, width, any_reselect, sparsity)
        return _Captured(graph, static, logits)

    def _step(self, packed: torch.Tensor, width: int, any_reselect: bool, sparsity: SparsityConfig) -> torch.Tensor:
        tokens, batch = unpack(packed, self._tables, width)
        attend = DecodeStep(self._cache, sparsity, batch, any_reselect)
        return self._model.logits(self._model.forward(tokens, batch.positions, attend))
