"""The draw, row by row, in Python floats: float32 distances, as the definition has them, the rest in double."""

import math

import torch
from torch import Tensor


def kept_weights(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Unnormalized probabilities of one row of float32 logits [V] after all filters; 0.0 for what they drop."""
    distances = ((logits.max() - logits) / temperature).tolist()
    weights = [math.exp(-distance) for distance in distances]
    limit = -math.log(min_p) if min_p > 0 else math.inf
    ascending = sorted(distances)
    if top_k > 0:
        limit = min(limit, ascending[min(top_k, len(ascending)) - 1])
    if top_p < 1:
        inside = [distance for distance in ascending if distance <= limit]
        total, mass = sum(math.exp(-distance) for distance in inside), 0.0
        for distance in inside:
            mass += math.exp(-distance)
            if mass >= top_p * total:
                limit = min(limit, distance)
                break
    return [weight if distance <= limit else 0.0 for weight, distance in zip(weights, distances, strict=True)]


def possible_tokens(weights: list[float], uniform: float, slack: float) -> set[int]:
    """The tokens whose share of [0, 1), widened by slack at both ends, holds the number."""
    total, below, found = sum(weights), 0.0, set()
    for token, weight in enumerate(weights):
        if weight and below / total - slack <= uniform < (below + weight) / total + slack:
            found.add(token)
        below += weight
    return found


def greedy(logits: Tensor) -> int:
    """The first of the largest logits of one row."""
    return int((logits == logits.max()).to(torch.int8).argmax())
