"""The pools' tensors: where pages, tails and page choices live on a device, and how their bytes go in and out."""

import torch

from lserve.kernels.views import LayerView, Selection

from .config import PAGE_SIZE, ModelConfig, SparsityConfig
from .page_format import PageFormat


class KVCache:
    """Pools of one worker. Page ids and rows are handed out by `PagePool`; this class only stores.

    retrieval, streaming: uint8 [pages, slots, slot_bytes], page-major, so a page leaves as it lies.
    tail: compute dtype [rows, layers, KV heads, 2 (K, V), 64, head_dim].
    selected, selected_counts: int32 [layers, rows, KV heads, J] and [layers, rows, KV heads].
    """

    def __init__(
        self,
        page_format: PageFormat,
        model: ModelConfig,
        sparsity: SparsityConfig,
        num_retrieval_pages: int,
        num_streaming_pages: int,
        num_rows: int,
        device: str | torch.device,
        dtype: torch.dtype,
    ) -> None:
        layout = page_format.layout
        self.page_format = page_format
        self.dtype = dtype
        self.device = torch.device(device)
        shape = (num_retrieval_pages, page_format.num_retrieval_slots, layout.slot_bytes)
        self.retrieval = torch.zeros(shape, dtype=torch.uint8, device=device)
        shape = (num_streaming_pages, page_format.num_streaming_slots, layout.slot_bytes)
        self.streaming = torch.zeros(shape, dtype=torch.uint8, device=device)
        tail_shape = (num_rows, model.num_layers, model.num_kv_heads, 2, PAGE_SIZE, model.head_dim)
        self.tail = torch.zeros(tail_shape, dtype=dtype, device=device)
        self.max_selected = sparsity.max_token_budget // PAGE_SIZE
        state = (model.num_layers, num_rows, model.num_kv_heads)
        self.selected = torch.zeros(*state, self.max_selected, dtype=torch.int32, device=device)
        self.selected_counts = torch.zeros(state, dtype=torch.int32, device=device)
        flags = torch.tensor(page_format.streaming, dtype=torch.bool)
        self.class_heads = {
            name: (flags.flatten() == is_streaming).nonzero().squeeze(1).to(device)
            for name, is_streaming in (("retrieval", False), ("streaming", True))
        }
        self.layers = [self._layer_view(layer, flags[layer], model, sparsity) for layer in range(model.num_layers)]
        self.selections = [Selection(self.selected[i], self.selected_counts[i]) for i in range(model.num_layers)]

    def _layer_view(
        self, layer: int, streaming: torch.Tensor, model: ModelConfig, sparsity: SparsityConfig
    ) -> LayerView:
        first_retrieval, first_streaming = self.page_format.first_slots(layer)
        return LayerView(
            layout=self.page_format.layout,
            retrieval_pool=self.retrieval,
            streaming_pool=self.streaming,
            head_slots=torch.tensor(self.page_format.head_slots(layer), dtype=torch.int32, device=self.device),
            head_streaming=streaming.to(self.device),
            retrieval_heads=(~streaming).nonzero().squeeze(1).to(self.device),
            streaming_heads=streaming.nonzero().squeeze(1).to(self.device),
            first_retrieval_slot=first_retrieval,
            first_streaming_slot=first_streaming,
            tail_key=self.tail[:, layer, :, 0],
            tail_value=self.tail[:, layer, :, 1],
            sink_size=sparsity.sink_size,
            local_window=sparsity.local_window,
            scale=model.head_dim**-0.5,
        )

    @property
    def pools(self) -> dict[str, torch.Tensor]:
        """The pools as bytes, uint8 [units, unit bytes], as transport registers and moves them."""
        tail = self.tail.view(self.tail.shape[0], -1).view(torch.uint8)
        pools = {"retrieval": self.retrieval.flatten(1), "streaming": self.streaming.flatten(1), "tail": tail}
        return {name: pool for name, pool in pools.items() if pool.numel()}

    def export(self, pool: str, units: list[int]) -> torch.Tensor:
        """A host copy of pages or rows, uint8 [len(units), unit bytes]."""
        index = torch.tensor(units, dtype=torch.int64, device=self.device)
        return self.pools[pool].index_select(0, index).cpu()

    def restore(self, pool: str, units: list[int], data: torch.Tensor) -> None:
        """Writes what `export` returned, or pages from elsewhere, uint8 [len(units), unit bytes]."""
        index = torch.tensor(units, dtype=torch.int64, device=self.device)
        self.pools[pool].index_copy_(0, index, data.to(self.device))

    def copy_row(self, source: int, target: int) -> None:
        """Copies a tail row (a further choice starts from the same incomplete page)."""
        self.tail[target].copy_(self.tail[source])

    @property
    def selection_row_bytes(self) -> int:
        """Bytes of a row's page choices."""
        return (self.selected.nbytes + self.selected_counts.nbytes) // self.selected.shape[1]

    def export_selection(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Host copies of a row's page choices."""
        return self.selected[:, row].clone().cpu(), self.selected_counts[:, row].clone().cpu()

    def restore_selection(self, row: int, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Puts back what `export_selection` returned, maybe under another row."""
        self.selected[:, row] = state[0].to(self.device)
        self.selected_counts[:, row] = state[1].to(self.device)
