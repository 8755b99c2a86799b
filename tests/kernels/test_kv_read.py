"""Reading pages back: every path decodes to the oracle's numbers and writes nowhere else."""

import pytest
import torch
from attention_cases import poisoned_pool, random_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import kv_read
from lserve.kernels.cpu.codec import encode_slots
from lserve.kernels.gpu import kv_read as gpu_kv_read
from lserve.kernels.oracle import kv as oracle
from lserve.kernels.slot_layout import NUM_LEVELS, make_slot_layout

PATHS = pytest.mark.parametrize("path", [kv_read, gpu_kv_read], ids=["launcher", "kernel"])
ROUNDING = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def check_read(path, kv_dtype, head_dim, logical_page_size, num_pages, num_heads, dtype, device):
    layout = make_slot_layout(kv_dtype, head_dim, logical_page_size)
    pool = poisoned_pool(num_pages + 2, num_heads + 1, layout)
    page_ids = torch.randperm(num_pages + 2)[:num_pages]
    slots = torch.randperm(num_heads + 1)[:num_heads]
    heads = torch.randperm(num_heads + 1)[:num_heads]
    offsets = torch.randperm(num_pages + 1)[:num_pages] * layout.page_size
    value = torch.randn(num_pages, num_heads, layout.page_size, head_dim)
    pool[page_ids[:, None], slots] = encode_slots(random_keys(*value.shape), value, layout)
    scratch = torch.full((2, num_heads + 1, (num_pages + 1) * layout.page_size, head_dim), torch.nan, device=device).to(
        dtype
    )
    indices = [x.to(device) for x in (page_ids, slots, heads, offsets)]
    path.read_pages(pool.to(device), indices[0], indices[1], layout, scratch[0], scratch[1], indices[2], indices[3])
    scratch = scratch.cpu()
    for n, page in enumerate(page_ids.tolist()):
        for slot, head in zip(slots.tolist(), heads.tolist(), strict=True):
            place = slice(int(offsets[n]), int(offsets[n]) + layout.page_size)
            for decoded, expected in zip(
                scratch[:, head, place], oracle.decode_slot(pool[page, slot], layout), strict=True
            ):
                error = (decoded.double() - expected).abs()
                assert (error <= ROUNDING[dtype] * expected.abs().clamp(min=1)).all()
    assert scratch.isnan().sum() == scratch.numel() - 2 * num_pages * num_heads * layout.page_size * head_dim


@PATHS
@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@settings(deadline=None, max_examples=4)
@given(
    head_dim=st.sampled_from([16, 64, 80]),
    logical_page_size=st.sampled_from([16, 32, 64]),
    num_pages=st.integers(0, 2),
    num_heads=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_pages_read_back(path, kv_dtype, device, head_dim, logical_page_size, num_pages, num_heads, dtype):
    check_read(path, kv_dtype, head_dim, logical_page_size, num_pages, num_heads, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@pytest.mark.parametrize("head_dim,logical_page_size", [(64, 32), (80, 16), (96, 64), (128, 32), (256, 32)])
def test_pages_on_the_card(kv_dtype, head_dim, logical_page_size):
    check_read(gpu_kv_read, kv_dtype, head_dim, logical_page_size, 3, 2, torch.bfloat16, "cuda")
