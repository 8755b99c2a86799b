"""Sparsity made visible: which pages the retrieval heads read, and how much of their attention those pages hold.

Only requests that ask for it are recorded (`AttentionOptions.trace`), and only when a choice of pages is made, every
`reselect_interval` tokens. What it costs, then:

- The choices are counted where they lie and copied to the host: some tens of kilobytes, and a wait for the device.
- The true attention is computed over every page of the request, chosen or not, for an eighth of the layers in turn:
  about what dense attention costs in these layers. On a GPU the step also runs without its CUDA graph, which costs
  every request in the batch some milliseconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lserve.kernels.kv_read import read_pages
from lserve.kernels.views import LayerView

from .attention import budget_pages
from .config import PAGE_SIZE, SparsityConfig
from .kv_cache import KVCache
from .request import PageChoice
from .sequence import Sequence

LAYERS_BETWEEN = 8
"""One layer of so many is sampled at each choice."""

MAX_READ = 128
MAX_ATTENDED = 16
PAGES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class HeadChoices:
    """One choice, head by head, for listeners in the engine's process.

    position: of the token whose query chose. read: bool [layers, KV heads, pages]; false for streaming heads.
    mass: float32 [layers, KV heads, pages + 1], each head's true attention per page, the mean over its query heads, the
    newest page last; NaN where it was not sampled. Both on the host.
    """

    request_id: str
    choice: int
    position: int
    read: torch.Tensor
    mass: torch.Tensor


@dataclass(slots=True)
class _Sampled:
    """A sequence whose choice is being made: its place in the batch, and true attention by layer."""

    sequence: Sequence
    index: int
    page_ids: torch.Tensor
    mass: dict[int, torch.Tensor] = field(default_factory=dict)


class TraceRecorder:
    """Watches one engine's decode steps. listener: is told each choice in full."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._stride = min(LAYERS_BETWEEN, len(cache.layers))
        self._sparsity = SparsityConfig()
        self._sampled: list[_Sampled] = []
        self.listener: Callable[[HeadChoices], None] | None = None

    def begin(self, sequences: list[Sequence], sparsity: SparsityConfig) -> bool:
        """Before a step: notes whose choice is due and wants a trace. True when `see` must be called."""
        interval = sparsity.reselect_interval
        self._sparsity, self._sampled = sparsity, []
        for index, sequence in enumerate(sequences):
            due = sequence.fresh or sequence.position % interval == 0
            if due and sequence.request.attention.trace and self._cache.page_format.num_retrieval_slots:
                page_ids = torch.tensor(sequence.retrieval_pages[: sequence.own_page], dtype=torch.int64)
                self._sampled.append(_Sampled(sequence, index, page_ids.to(self._cache.device)))
        return bool(self._sampled)

    def see(self, layer: int, query: torch.Tensor) -> None:
        """Before a layer attends, its pages chosen: query [B, Hq, D] as attention got it."""
        view = self._cache.layers[layer]
        for sampled in self._sampled:
            turn = sampled.sequence.position // self._sparsity.reselect_interval % self._stride
            if layer % self._stride == turn and view.retrieval_heads.numel():
                sampled.mass[layer] = self._true_mass(view, query[sampled.index], sampled)

    def finish(self) -> dict[Sequence, PageChoice]:
        """After the step: what was chosen. Nothing after a step that decoded nobody."""
        done, self._sampled = self._sampled, []
        return {sampled.sequence: self._choice(sampled) for sampled in done}

    def _true_mass(self, view: LayerView, query: torch.Tensor, sampled: _Sampled) -> torch.Tensor:
        """Attention of one token [Hq, D] per page, the own page last: float32 [retrieval heads, pages + 1]."""
        cache, heads, row = self._cache, view.retrieval_heads, sampled.sequence.row
        assert row is not None
        grouped = (query.float() * view.scale).view(view.head_slots.numel(), -1, query.shape[1])[heads]
        slots, local = view.head_slots[heads].long(), torch.arange(heads.numel(), device=cache.device)
        shape = (2, heads.numel(), PAGES_AT_ONCE * PAGE_SIZE, query.shape[1])
        scratch = torch.empty(shape, dtype=cache.dtype, device=cache.device)
        sums = []
        for first in range(0, sampled.page_ids.numel(), PAGES_AT_ONCE):
            page_ids = sampled.page_ids[first : first + PAGES_AT_ONCE]
            offsets = torch.arange(page_ids.numel(), device=cache.device) * PAGE_SIZE
            read_pages(view.retrieval_pool, page_ids, slots, view.layout, scratch[0], scratch[1], local, offsets)
            keys = scratch[0, :, : page_ids.numel() * PAGE_SIZE].float()
            sums.append((grouped @ keys.mT).view(*grouped.shape[:2], -1, PAGE_SIZE).logsumexp(-1))
        own = view.tail_key[row, heads, : sampled.sequence.position % PAGE_SIZE + 1].float()
        sums.append((grouped @ own.mT).logsumexp(-1, keepdim=True))
        return torch.cat(sums, dim=-1).softmax(-1).mean(1)

    def _choice(self, sampled: _Sampled) -> PageChoice:
        sequence = sampled.sequence
        num_pages, num_heads = sequence.own_page, self._cache.page_format.num_retrieval_slots
        everything = num_pages + 1 <= budget_pages(sequence, self._sparsity)
        read = self._read(sequence, everything)
        mass = torch.full((*read.shape[:2], num_pages + 1), torch.nan)
        for layer, share in sampled.mass.items():
            mass[layer, self._cache.layers[layer].retrieval_heads.cpu()] = share.cpu()
        if self.listener is not None:
            position = sequence.position
            self.listener(HeadChoices(sequence.request_id, sequence.choice, position, read, mass))
        counts = read.sum((0, 1))
        order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
        seen = ~mass[..., 0].isnan()
        share, kept = mass[seen].mean(0), (mass[..., :-1] * read).sum(-1) + mass[..., -1]
        top = share[:-1].topk(min(MAX_ATTENDED, num_pages)) if seen.any() else None
        return PageChoice(
            token=sequence.num_tokens - len(sequence.request.prompt_token_ids),
            num_pages=num_pages,
            num_heads=num_heads,
            everything=everything,
            read=() if everything else tuple((page, int(counts[page])) for page in order[:MAX_READ]),
            num_left_out=0 if everything else max(len(order) - MAX_READ, 0),
            mass_kept=float(kept[seen].mean()) if seen.any() else None,
            num_sampled=int(seen.sum()),
            attended=() if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
        )

    def _read(self, sequence: Sequence, everything: bool) -> torch.Tensor:
        """Which pages each head reads, bool [layers, KV heads, pages], on the host."""
        cache, row = self._cache, sequence.row
        retrieves = ~torch.tensor(cache.page_format.streaming)
        read = torch.zeros(*retrieves.shape, sequence.own_page, dtype=torch.bool)
        if everything:
            return read | retrieves[..., None]
        assert row is not None
        pages, counts = cache.selected[:, row].cpu().long(), cache.selected_counts[:, row].cpu()
        listed = (torch.arange(pages.shape[2]) < counts[..., None]) & retrieves[..., None]
        layers, heads, _ = listed.nonzero(as_tuple=True)
        read[layers, heads, pages[listed]] = True
        return read
