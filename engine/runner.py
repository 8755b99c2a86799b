"""Batches to tensors: runs the model over a step's chunks and decode tokens."""

import torch

from .attention import DecodeStep, PrefillStep
from .config import SparsityConfig
from .kv_cache import KVCache
from .model import Model
from .sequence import PrefillChunk, Sequence


class Runner:
    """Runs one model on one device over the pools of one cache."""

    def __init__(self, model: Model, cache: KVCache, sparsity: SparsityConfig) -> None:
        self.model, self._cache, self.sparsity = model, cache, sparsity

    @torch.inference_mode()
    def prefill(self, chunks: list[PrefillChunk]) -> torch.Tensor:
        """Computes the chunks; returns float32 logits [chunks that end a prefill, vocabulary] after their last
        token.
        """
        device = self._cache.device
        tokens = [t for c in chunks for t in c.sequence.token_ids[c.start : c.end]]
        positions = torch.cat([torch.arange(c.start, c.end) for c in chunks])
        step = PrefillStep(self._cache, self.sparsity, chunks)
        hidden = self.model.forward(torch.tensor(tokens, device=device), positions.to(device), step)
        ends = torch.tensor([c.length for c in chunks]).cumsum(0) - 1
        last = torch.tensor([c.is_last for c in chunks])
        return self.model.logits(hidden[ends[last].to(device)])

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> torch.Tensor:
        """Computes each sequence's newest token; returns float32 logits [sequences, vocabulary]."""
        step = DecodeStep(self._cache, self.sparsity, sequences)
        tokens = torch.tensor([s.token_ids[-1] for s in sequences], device=self._cache.device)
        hidden = self.model.forward(tokens, step.batch.positions, step)
        step.seal()
        return self.model.logits(hidden)
