"""`page_select`: which pages a retrieval head reads in a decode step (DESIGN.md section 4)."""

import torch

from .cpu import page_select as cpu
from .views import DecodeBatch, LayerView, Selection


def page_select(
    query: torch.Tensor,
    layer: LayerView,
    batch: DecodeBatch,
    selection: Selection,
    candidate_factor: int = 4,
    two_stage: bool = True,
) -> None:
    """Writes the page choice of every sequence whose `reselect` is set and whose pages do not fit its budget.

    query: [B, Hq, D] after RoPE, unscaled; the group's query heads of KV head h are h * group_size and on.
    The new token must already be in the tail. Per KV head:

    - always kept: sink pages, pages that overlap the last local_window positions, and the own page (in the tail, not
      listed).
    - candidates: of the other sealed pages, the candidate_factor * budget_pages with the largest bound
      q . centre + |q| . radius (scaled query), maximum over a page's logical pages and over the group.
    - choice: per query head the log-sum-exp of q . k over the tokens of each candidate and always-kept page (the own
      page's tokens so far included), softmax over these pages, mean over the group; the top ones, so that with the
      always-kept pages and the own page at most budget_pages are read. Ties go to the lower page index.

    two_stage=False keeps the first stage alone (LServe's rule; logical pages of 16 tokens make it the paper's).
    """
    if query.is_cuda:
        from .gpu import page_select as gpu

        gpu.page_select(query, layer, batch, selection, candidate_factor, two_stage)
    else:
        cpu.page_select(query, layer, batch, selection, candidate_factor, two_stage)
