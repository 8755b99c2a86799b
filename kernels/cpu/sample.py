"""CPU path of `sample`: filters look at the best tokens first, and at all of them only where these do not decide."""

import torch
from torch import Tensor

_SORTED_AT_FIRST = 256


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    filtered: bool,
    greedy_below: float,
) -> Tensor:
    """See `kernels.sample.sample`."""
    tokens = logits.argmax(-1)
    drawn = (temperature >= greedy_below).nonzero().flatten()
    if drawn.numel():
        parameters = (x[drawn] for x in (logits, temperature, top_k, top_p, min_p, uniform))
        tokens[drawn] = _draw(*parameters, filtered)
    return tokens


def _draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, filtered: bool
) -> Tensor:
    # how far below the row's best a token is, in units of temperature; a token is kept up to some distance
    distance = (logits.amax(-1, keepdim=True) - logits) / temperature[:, None]
    limit = -min_p.log()[:, None]
    rows = ((top_k > 0) | (top_p < 1)).nonzero().flatten()
    if filtered and rows.numel():
        width = min(max(_SORTED_AT_FIRST, int(top_k.max())), distance.shape[1])
        limit[rows] = _cut(distance[rows], limit[rows], top_k[rows], top_p[rows], width)
    weights = torch.where(distance <= limit, (-distance).exp(), 0.0)
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _cut(distance: Tensor, limit: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """The limit [N, 1] lowered by top_k, then by top_p of what is left, from the `width` best tokens where they do."""
    before, vocab_size = limit, distance.shape[1]
    best = distance.topk(width, largest=False).values
    count = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()[:, None]
    kth = best.gather(1, count.clamp(max=width) - 1)
    limit = torch.where(count <= width, torch.minimum(limit, kth), limit)
    share = top_p.double()[:, None]
    total = torch.where(distance <= limit, (-distance).exp(), 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    mass = torch.where(best <= limit, (-best).exp(), 0.0).cumsum(-1, dtype=torch.float64)
    crossing = (mass < share * total).sum(-1, keepdim=True)
    nucleus = torch.minimum(limit, best.gather(1, crossing.clamp(max=width - 1)))
    limit = torch.where(share < 1, nucleus, limit)
    if width < vocab_size:
        short = ((crossing == width) & (share < 1)).flatten().nonzero().flatten()
        if short.numel():
            limit[short] = _cut(distance[short], before[short], top_k[short], top_p[short], vocab_size)
    return limit
