"""Programmatic dependent launch: from Hopper on, a kernel may start while the one ahead in the stream still runs.

A kernel launched with `launch_pdl=True` calls `after_previous` before it touches anything but weights; from there on
all earlier work is complete. What stands before that call overlaps the previous kernel: a linear layer brings its
first weights there. Kernels launched without the flag wait for everything, as always.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether kernels on this device may use `launch_pdl=True`."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)
    )


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may start as soon as every program of this one has come here."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Waits until the kernel ahead is done and its writes can be seen."""
    if PDL:
        gdc_wait()


@triton.jit
def zero_after_previous(step, PDL: tl.constexpr):
    """`after_previous` inside a pipelined loop: 0, to be added to the addresses that must wait.

    What a step loads from other addresses is asked for before the wait, since the loop's first loads stand ahead of it.
    """
    if PDL:
        return tl.inline_asm_elementwise(
            """{ .reg .pred first; setp.eq.s32 first, $1, 0; @first griddepcontrol.wait; mov.u32 $0, 0; }""",
            "=r,r", [step], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 0


@triton.jit
def prefetch_run(pointer, NUM_BYTES: tl.constexpr):
    """Asks once for NUM_BYTES (a multiple of 16) from a scalar pointer on to be brought into the L2. Hopper on."""
    # every thread runs the assembly of a scalar; one of them asks
    tl.inline_asm_elementwise(
        """{ .reg .pred first; .reg .u32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }""",
        "=r,l,r", [pointer, NUM_BYTES], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
