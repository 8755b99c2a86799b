"""Where a GPU's time goes: kernels by name, out of torch's profiler, which sees inside CUDA graphs."""

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# the first pattern that fits decides
PARTS = (
    ("linears", r"w4a8|w8a8|decode_w4|gemm|gemv|cutlass|nvjet|splitKreduce|cublas"),
    ("selector", r"_bounds_|_candidates_|_masses_|_choice_|_select|_top_pages|_score_groups|_keep_blocks"),
    ("attention", r"_decode_packed|_decode_kernel|_merge_kernel|_prefill_attention"),
    ("pages", r"_append_tail|_write_pages|_read_pages"),
    ("norms, rope, activations", r"norm_kernel|rope_kernel|silu_mul|quantize_kernel"),
    ("sampling", r"reduce_kernel|peak_kernel|search_kernel|mass_kernel|draw_kernel|ArgMax|argmax"),
)
REST = "rest"


def device_parts(run: Callable[[], object], steps: int) -> tuple[dict[str, float], dict[str, tuple[int, float]]]:
    """Milliseconds of device time in a step, by part; and of its 20 longest kernels: (calls in all, ms a step).

    run: does `steps` steps. Kernels that overlap (programmatic dependent launch) count from the end of the one before,
    so the parts add up to the time in which the device was busy.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    parts: dict[str, float] = dict.fromkeys([*(name for name, _ in PARTS), REST], 0.0)
    kernels: defaultdict[str, list[float]] = defaultdict(list)
    end = 0.0
    for event in sorted(events, key=lambda e: e.time_range.start):
        exposed = max(event.time_range.end - max(event.time_range.start, end), 0.0) / 1e3 / steps
        end = max(end, event.time_range.end)
        parts[next((part for part, names in PARTS if re.search(names, event.name)), REST)] += exposed
        kernels[event.name[:80]].append(exposed)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:20]
    return parts, {name: (len(times), sum(times)) for name, times in longest}
