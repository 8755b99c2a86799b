"""How decode kernels share out work: pages of all sequences and heads in one line, cut into equal runs.

A batch is ragged and its lengths live on the device, so no grid can follow them. Instead every program of a fixed
grid takes the same number of consecutive units, whichever sequences and heads they belong to (stream-K): one long
request among short ones still fills the chip. Run p of pair k = (sequence, head) has the result place p + k: along
the line either p or k moves on, so places are unique, and a pair's places are consecutive.
"""

import torch
import triton
import triton.language as tl

PROGRAMS_IN_INTERPRETER = 5
"""Few, odd, so that runs end inside heads and sequences."""


def num_programs(tensor: torch.Tensor, per_multiprocessor: int) -> int:
    """Programs that fill the tensor's device once."""
    if not tensor.is_cuda:
        return PROGRAMS_IN_INTERPRETER
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count * per_multiprocessor


@triton.jit
def runs(total, programs, MIN_UNITS: tl.constexpr):
    """How many programs take a run: all, or fewer so that a run has at least MIN_UNITS."""
    return tl.maximum(tl.minimum(programs, total // MIN_UNITS), 1)


@triton.jit
def run_start(program, total, num_runs):
    """The first unit of a program's run; runs differ by one unit at most."""
    return (tl.minimum(program, num_runs).to(tl.int64) * total // num_runs).to(tl.int32)


@triton.jit
def run_of(unit, total, num_runs):
    """The program whose run a unit belongs to."""
    return (((unit + 1).to(tl.int64) * num_runs - 1) // total).to(tl.int32)


@triton.jit
def sealed_pages(positions, P: tl.constexpr):
    """Pages before the own one."""
    return (positions // P).to(tl.int32)


@triton.jit
def first_window_page(positions, window, P: tl.constexpr):
    """The first page that overlaps the last `window` positions."""
    return (tl.maximum(positions - window + 1, 0) // P).to(tl.int32)


@triton.jit
def always_kept(positions, sink_pages, window, P: tl.constexpr):
    """How many sealed pages belong to sink or window."""
    sealed = sealed_pages(positions, P)
    first = tl.maximum(first_window_page(positions, window, P), sink_pages)
    return tl.minimum(sealed, sink_pages) + tl.maximum(sealed - first, 0)


@triton.jit
def listed_pages(positions, budget, sink_pages, window, P: tl.constexpr):
    """At least as many pages as a retrieval head's list holds (exactly so where everything fits the budget)."""
    sealed = sealed_pages(positions, P)
    kept = tl.maximum(budget - 1, always_kept(positions, sink_pages, window, P))
    return tl.where(sealed + 1 <= budget, sealed, tl.minimum(sealed, kept))


@triton.jit
def sequence_of(ends, unit):
    """The sequence that a unit belongs to and that sequence's first unit, from the running ends int32 [B]."""
    before = ends <= unit
    return tl.sum(before.to(tl.int32), 0), tl.max(tl.where(before, ends, 0), 0)


@triton.jit
def pick(values, lines, index):
    """The value at an index of a vector over `lines` (its own indices): no load to wait for."""
    return tl.sum(tl.where(lines == index, values, 0), 0)


@triton.jit
def chooses(position, budget, reselect, P: tl.constexpr):
    """Whether a sequence makes a choice in this step."""
    return (reselect != 0) & (sealed_pages(position, P) + 1 > budget)


@triton.jit
def candidate_bound(position, budget, factor, sink_pages, window, P: tl.constexpr):
    """Candidates and always-kept pages together, at most (exactly so, while enough pages exist)."""
    return tl.minimum(sealed_pages(position, P), factor * budget + always_kept(position, sink_pages, window, P))
