"""Writing the cache: codes, statistics and packing against the oracle, and nothing written beside them."""

import pytest
import torch
from attention_cases import POISON, make_layer, poisoned_pool, random_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import kv_write
from lserve.kernels.gpu import kv_write as gpu_kv_write
from lserve.kernels.oracle import kv as oracle
from lserve.kernels.slot_layout import NUM_LEVELS, SlotLayout, make_slot_layout

PATHS = pytest.mark.parametrize("path", [kv_write, gpu_kv_write], ids=["launcher", "kernel"])


def written(path, layout: SlotLayout, key: torch.Tensor, value: torch.Tensor, device: str, valid=None):
    """Pages [N, P, heads, D] written to a poisoned pool at shuffled places; the pool on the CPU, page ids, slots,
    heads.
    """
    num_pages, _, num_heads, _ = key.shape
    heads = torch.randperm(num_heads)[: max(num_heads - 1, 1)]
    page_ids = torch.randperm(num_pages + 2)[:num_pages]
    slots = torch.randperm(len(heads) + 1)[: len(heads)]
    pool = poisoned_pool(num_pages + 2, len(heads) + 1, layout, device)
    arguments = [x.to(device) for x in (key, value, heads)]
    path.write_pages(
        *arguments, pool, page_ids.to(device), slots.to(device), layout, None if valid is None else valid.to(device)
    )
    return pool.cpu(), page_ids, slots, heads


def assert_equal_slots(slot: torch.Tensor, expected: torch.Tensor, layout: SlotLayout):
    """Statistics equal to the bit; at most 0.1 % of the codes (and one) differ, by one step."""
    parts = [(layout.key_min, layout.value_codes)]
    if layout.float_dtype is None:
        parts.append((layout.value_min, layout.slot_bytes))
        for offset, bits in ((0, layout.key_bits), (layout.value_codes, layout.value_bits)):
            difference = (
                oracle.codes_of(slot, offset, bits, layout) - oracle.codes_of(expected, offset, bits, layout)
            ).abs()
            assert difference.max() <= 1
            assert (difference > 0).sum() <= 1 + difference.numel() // 1000
    else:
        parts = [(0, layout.slot_bytes)]
    for first, last in parts:
        used = last if last != layout.slot_bytes else len(expected)
        assert torch.equal(slot[first:used], expected[first:used])


def check_pages(path, layout: SlotLayout, num_pages: int, num_heads: int, dtype: torch.dtype, device: str, valid=None):
    # numbers of fp16, so that a range's width is exact in float32, and its step equal to float64's
    key = random_keys(num_pages, layout.page_size, num_heads, layout.head_dim).half().to(dtype)
    value = torch.randn(num_pages, layout.page_size, num_heads, layout.head_dim).half().to(dtype)
    pool, page_ids, slots, heads = written(path, layout, key, value, device, valid)
    untouched = torch.ones(pool.shape[:2], dtype=torch.bool)
    for n, page in enumerate(page_ids.tolist()):
        for slot, head in zip(slots.tolist(), heads.tolist(), strict=True):
            if valid is None or valid[n]:
                untouched[page, slot] = False
                expected = oracle.encode_slot(key[n, :, head], value[n, :, head], layout)
                assert_equal_slots(pool[page, slot], expected, layout)
    assert (pool[untouched] == POISON).all()


@PATHS
@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@settings(deadline=None, max_examples=4)
@given(
    head_dim=st.sampled_from([16, 24, 64, 80]),
    logical_page_size=st.sampled_from([16, 32, 64]),
    num_pages=st.integers(1, 2),
    num_heads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_pages_hold_what_the_format_says(
    path, kv_dtype, device, head_dim, logical_page_size, num_pages, num_heads, seed
):
    torch.manual_seed(seed)
    layout = make_slot_layout(kv_dtype, head_dim, logical_page_size)
    dtype = torch.float32 if kv_dtype in ("float32", "bf16") else torch.float16
    if kv_dtype == "bf16" and path is gpu_kv_write and device == "cpu":
        return  # the interpreter rounds to bf16 wrongly
    check_pages(path, layout, num_pages, num_heads, dtype, device)


@PATHS
def test_invalid_pages_are_left_alone(path, device):
    check_pages(path, make_slot_layout("int4", 32), 3, 2, torch.float32, device, torch.tensor([True, False, True]))


@PATHS
@pytest.mark.parametrize("kv_dtype", ["int4", "int8", "float32"])
def test_extreme_values_stay_within_range(path, kv_dtype, device):
    """Constant channels and tokens, zeros, huge and tiny numbers: finite, and every key inside its logical page's
    range.
    """
    layout = make_slot_layout(kv_dtype, 16)
    key = torch.randn(1, 64, 1, 16)
    key[..., 0], key[..., 1], key[..., 2], key[..., 3] = 0.0, 3.3, -7.7, 1e-7 * key[..., 3]
    key[..., 4] *= 1e4
    value = torch.randn(1, 64, 1, 16)
    value[:, 0], value[:, 1] = 0.0, -2.5
    pool, page_ids, slots, _ = written(path, layout, key, value, device)
    slot = pool[page_ids[0], slots[0]]
    decoded_key, decoded_value = oracle.decode_slot(slot, layout)
    assert decoded_key.isfinite().all() and decoded_value.isfinite().all()
    centre, radius = (x.repeat_interleave(layout.logical_page_size, 0) for x in oracle.key_range(slot, layout))
    for x in (decoded_key, key[0, :, 0].double()):
        assert ((x - centre).abs() <= radius * (1 + 1e-6) + 1e-12).all()
    if layout.float_dtype is None:
        assert ((decoded_key - key[0, :, 0]).abs() <= radius / layout.key_levels * 1.01 + 1e-6).all()


@PATHS
@settings(deadline=None, max_examples=5)
@given(num_batch=st.integers(0, 4), num_heads=st.integers(1, 3), head_dim=st.sampled_from([8, 64, 80]))
def test_new_tokens_reach_their_place_in_the_tail(path, device, num_batch, num_heads, head_dim):
    layer = make_layer(make_slot_layout("int4", head_dim), [False] * num_heads, 1, num_batch + 2, torch.float32, device)
    rows = torch.randperm(num_batch + 2)[:num_batch].to(device)
    positions = torch.randint(0, 1000, (num_batch,), device=device)
    key, value = torch.randn(2, num_batch, num_heads, head_dim, device=device)
    path.append_tail(key, value, layer.tail_key, layer.tail_value, rows, positions)
    for tail, x in ((layer.tail_key, key), (layer.tail_value, value)):
        assert torch.equal(tail[rows, :, positions % 64], x)
        assert tail.isnan().sum() == tail.numel() - x.numel()


@PATHS
def test_nothing_to_write(path, device):
    layout = make_slot_layout("int4", 16)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    key = torch.empty(0, 64, 1, 16, device=device)
    path.write_pages(
        key,
        key,
        torch.zeros(1, dtype=torch.int64, device=device),
        poisoned_pool(1, 1, layout),
        nothing,
        nothing,
        layout,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@pytest.mark.parametrize("head_dim,logical_page_size", [(64, 32), (80, 16), (96, 64), (128, 32), (256, 32)])
def test_pages_on_the_card(kv_dtype, head_dim, logical_page_size):
    dtype = torch.float32 if kv_dtype == "float32" else torch.bfloat16
    check_pages(gpu_kv_write, make_slot_layout(kv_dtype, head_dim, logical_page_size), 3, 3, dtype, "cuda")
