"""What a decode step must know about its sequences, as one small block of numbers that goes to the device in one
copy.
"""

from collections.abc import Sequence as SequenceOf

import torch

from lserve.kernels.views import DecodeBatch

from .attention import budget_pages
from .config import SparsityConfig
from .page_tables import PageTables
from .sequence import Sequence

NUM_FIELDS = 5


def pack(sequences: SequenceOf[Sequence], sparsity: SparsityConfig, size: int, spare_row: int) -> torch.Tensor:
    """int64 [5, size] on the host: tokens, rows, positions, budgets in pages, reselect flags.

    Entries past the sequences decode token 0 at position 0 of the spare row, where it disturbs nobody.
    """
    interval, padding = sparsity.reselect_interval, size - len(sequences)
    fields = (
        [s.token_ids[-1] for s in sequences] + [0] * padding,
        [s.row for s in sequences] + [spare_row] * padding,
        [s.position for s in sequences] + [0] * padding,
        [budget_pages(s, sparsity) for s in sequences] + [1] * padding,
        [int(s.fresh or s.position % interval == 0) for s in sequences] + [0] * padding,
    )
    return torch.tensor(fields, dtype=torch.int64)


def unpack(packed: torch.Tensor, tables: PageTables, max_pages: int) -> tuple[torch.Tensor, DecodeBatch]:
    """Token ids and the kernels' view of `pack`'s numbers, on the device, without a synchronization."""
    tokens, rows, positions, budgets, reselect = packed.unbind(0)
    batch = DecodeBatch(
        rows=rows,
        positions=positions,
        retrieval_table=tables.retrieval[:, :max_pages].index_select(0, rows),
        streaming_table=tables.streaming[:, :max_pages].index_select(0, rows),
        budget_pages=budgets.int(),
        reselect=reselect.bool(),
        max_pages=max_pages,
    )
    return tokens, batch
