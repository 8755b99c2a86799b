"""Batches to tensors: runs the model over a step's chunks and decode tokens."""

from collections.abc import Callable

import torch

from lserve.kernels.upload import upload

from .attention import DecodeStep, PrefillStep, seal_pages
from .config import PAGE_SIZE, SparsityConfig
from .decode_graphs import DecodeGraphs
from .decode_inputs import pack, unpack
from .kv_cache import KVCache
from .model import Model
from .page_tables import PageTables
from .sequence import PrefillChunk, Sequence

Observe = Callable[[int, torch.Tensor], None]
"""observe(layer, query [B, Hq, D]), when the layer has chosen its pages."""


class Runner:
    """Runs one model on one device over the pools of one cache. The cache's last tail row is the runner's own."""

    def __init__(self, model: Model, cache: KVCache, sparsity: SparsityConfig, max_model_len: int) -> None:
        self.model, self._cache, self.sparsity = model, cache, sparsity
        num_rows = cache.tail.shape[0]
        self._tables = PageTables(cache, num_rows, max_model_len // PAGE_SIZE + 1)
        self._spare_row = num_rows - 1
        self._graphs: DecodeGraphs | None = None
        if cache.device.type == "cuda":
            self._graphs = DecodeGraphs(model, cache, self._tables, self._spare_row)

    @torch.inference_mode()
    def prefill(self, chunks: list[PrefillChunk]) -> torch.Tensor:
        """Computes the chunks; returns float32 logits [choices, vocabulary] after the last token of those that end a
        prefill, one line for each choice that starts there.
        """
        device = self._cache.device
        tokens = [t for c in chunks for t in c.sequence.token_ids[c.start : c.end]]
        positions = torch.cat([torch.arange(c.start, c.end) for c in chunks])
        step = PrefillStep(self._cache, self.sparsity, chunks)
        token_ids, at = upload(tokens, torch.int64, device), upload(positions, torch.int64, device)
        hidden = self.model.forward(token_ids, at, step)
        ends = torch.tensor([c.length for c in chunks]).cumsum(0) - 1
        last = torch.tensor([c.is_last for c in chunks])
        hidden = hidden[upload(ends[last], torch.int64, device)]
        logits = self.model.logits(hidden)
        choices = [c.sequence.num_forks + 1 for c in chunks if c.is_last]
        if max(choices, default=1) == 1:
            return logits
        return logits[upload([i for i, count in enumerate(choices) for _ in range(count)], torch.int64, device)]

    def wait(self) -> None:
        """Until the device has done everything that it was given."""
        if self._cache.device.type == "cuda":
            torch.cuda.synchronize(self._cache.device)

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence], observe: Observe | None = None) -> torch.Tensor:
        """Computes each sequence's newest token; returns float32 logits [sequences, vocabulary].

        observe: sees every layer's queries, for which the step runs without a CUDA graph.
        """
        self._tables.update(sequences)
        if self._graphs is not None and observe is None:
            logits = self._graphs.run(sequences, self.sparsity)
        else:
            packed = pack(sequences, self.sparsity, len(sequences), self._spare_row)
            width = max(s.own_page for s in sequences) + 1
            tokens, batch = unpack(packed.to(self._cache.device), self._tables, width)
            attend = DecodeStep(self._cache, self.sparsity, batch, bool(packed[4].any()), observe)
            logits = self.model.logits(self.model.forward(tokens, batch.positions, attend))
        seal_pages(self._cache, sequences)
        return logits
