"""Decode attention: kernel and CPU path against float64 over ragged batches of both head classes."""

import pytest
import torch
from attention_cases import make_decode_case, without_poison
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import decode_attention
from lserve.kernels.cpu import decode_attention as cpu_decode_attention
from lserve.kernels.gpu import decode_attention as gpu_decode_attention
from lserve.kernels.oracle import decode as oracle
from lserve.kernels.slot_layout import NUM_LEVELS

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
DENSE = 2**30


def run(module, case) -> torch.Tensor:
    return module.decode_attention(case.query, case.layer, case.batch, case.selection).cpu().double()


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out - reference).norm() / reference.norm()).item()


def check(device="cpu", tolerance=None, **shape):
    case = make_decode_case(**shape)
    reference = oracle.decode_attention(case.query, case.layer, case.batch, case.selection)
    limit = tolerance or TOLERANCE[case.query.dtype]
    assert relative_error(run(gpu_decode_attention, case.to(device)), reference) < limit
    return case, reference


SHAPES = {
    "group_size": st.sampled_from([1, 2, 3, 4, 7]),
    "positions": st.lists(st.integers(0, 700), min_size=1, max_size=3).map(tuple),
    "streaming": st.sampled_from([(False,), (True,), (False, True), (True, False, False)]),
    "logical_page_size": st.sampled_from([16, 32, 64]),
    "budget": st.sampled_from([DENSE, 8]),
    "seed": st.integers(0, 99),
}


@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@settings(deadline=None, max_examples=4)
@given(head_dim=st.sampled_from([16, 64, 80]), dtype=st.sampled_from([torch.float32, torch.float16]), **SHAPES)
def test_kernel_equals_float64(
    device, kv_dtype, head_dim, dtype, group_size, positions, streaming, logical_page_size, budget, seed
):
    torch.manual_seed(seed)
    check(
        device, kv_dtype=kv_dtype, head_dim=head_dim, group_size=group_size, streaming=streaming, positions=positions,
        budgets=(budget,) * len(positions), logical_page_size=logical_page_size, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@settings(deadline=None, max_examples=10)
@given(head_dim=st.sampled_from([16, 64, 80]), **SHAPES)
def test_cpu_path_equals_float64(kv_dtype, head_dim, group_size, positions, streaming, logical_page_size, budget, seed):
    torch.manual_seed(seed)
    case = make_decode_case(
        kv_dtype=kv_dtype, head_dim=head_dim, group_size=group_size, streaming=streaming, positions=positions,
        budgets=(budget,) * len(positions), logical_page_size=logical_page_size,
    )  # fmt: skip
    reference = oracle.decode_attention(case.query, case.layer, case.batch, case.selection)
    assert relative_error(run(decode_attention, without_poison(case)), reference) < 1e-5


def test_cpu_path_takes_long_sequences_by_themselves(monkeypatch):
    case = without_poison(make_decode_case(positions=(700, 0, 64, 401), streaming=(False, True), group_size=2))
    reference = oracle.decode_attention(case.query, case.layer, case.batch, case.selection)
    for numbers in (1, 2 * 700 * 64):
        monkeypatch.setattr("lserve.kernels.cpu.codec.PART", numbers)
        assert relative_error(run(decode_attention, case), reference) < 1e-5


@pytest.mark.parametrize("streaming", [(False, False), (False, True), (True,)])
def test_cpu_path_decodes_shared_pages_once(monkeypatch, streaming):
    """Sequences that begin with the same 16 pages, then go on with pages of their own, decode those 16 once."""
    case = without_poison(make_decode_case(positions=(1148, 1088, 1411), streaming=streaming))
    for table in (case.batch.retrieval_table, case.batch.streaming_table):
        table[1:, :16] = table[0, :16]
    decoded = []
    decode_keys = cpu_decode_attention.decode_keys
    monkeypatch.setattr(
        cpu_decode_attention, "decode_keys", lambda data, layout: decoded.append(len(data)) or decode_keys(data, layout)
    )
    reference = oracle.decode_attention(case.query, case.layer, case.batch, case.selection)
    assert relative_error(run(decode_attention, case), reference) < 1e-5
    if not any(streaming):  # 17, 17 and 22 pages, of which 16 are shared; gathered in a rectangle of 22
        assert sum(decoded) == 2 * (16 + 3 * (22 - 16))


def test_streaming_window_is_exact_to_the_token(device):
    """One huge value, put on either side of the window's edge, counts or does not (a query of zeros weighs all tokens
    alike).
    """
    for position in (640, 703):
        for distance, counts in ((255, True), (256, False)):
            case = make_decode_case(kv_dtype="float32", positions=(position,), streaming=(True,), group_size=1)
            case.query.zero_()
            token = position - distance
            page = int(case.batch.streaming_table[0, token // 64])
            layout = case.layer.layout
            values = case.layer.streaming_pool[page, 1, layout.value_codes :].view(torch.float32)
            values.view(64, -1)[token % 64] = 1e6
            moved = run(gpu_decode_attention, case.to(device)).abs().max() > 1e2
            assert moved == counts


def test_one_long_sequence_among_short_ones(device):
    """Runs of work cross heads and sequences; each sequence's result is the one that it gets alone."""
    check(device, positions=(1500, 3, 64, 127), streaming=(False, True), group_size=2)


def test_empty_batch(device):
    case = make_decode_case(positions=(), budgets=()).to(device)
    assert run(gpu_decode_attention, case).shape == (0, 4, 64)


GPU_SHAPES = [
    # head_dim, group_size, logical_page_size
    (64, 1, 32), (64, 3, 64), (64, 16, 32), (80, 2, 32), (96, 4, 16), (128, 1, 64), (128, 2, 32), (128, 4, 32),
    (128, 7, 32), (128, 8, 16), (128, 16, 32), (256, 2, 32), (256, 8, 64),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@pytest.mark.parametrize("head_dim,group_size,logical_page_size", GPU_SHAPES)
def test_shapes_on_the_card(kv_dtype, head_dim, group_size, logical_page_size):
    dtype = torch.float32 if kv_dtype == "float32" else torch.bfloat16
    check(
        "cuda", tolerance=1e-5 if kv_dtype == "float32" else 6e-3,
        kv_dtype=kv_dtype, head_dim=head_dim, group_size=group_size, logical_page_size=logical_page_size, dtype=dtype,
        streaming=(False, True, False), positions=(2111, 0, 63, 64, 900, 1599), budgets=(DENSE, 8, 8, DENSE, 9, 14),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("num_batch", [1, 17, 64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_on_the_card(num_batch, dtype):
    positions = tuple(torch.randint(0, 500, (num_batch,)).tolist())
    check("cuda", positions=positions, head_dim=128, group_size=4, dtype=dtype, streaming=(False, True))


@pytest.mark.gpu
def test_long_context_on_the_card_equals_the_cpu_path():
    case = make_decode_case(
        positions=(40000, 70), head_dim=128, group_size=4, dtype=torch.bfloat16, streaming=(False, True)
    )
    reference = run(decode_attention, without_poison(case))
    assert relative_error(run(gpu_decode_attention, case.to("cuda")), reference) < 6e-3


@pytest.mark.gpu
def test_graph_replays_follow_the_lengths_on_the_device():
    """Captured once, replayed at other positions: grids do not depend on what lies on the device."""
    shape = {"head_dim": 128, "group_size": 4, "dtype": torch.bfloat16, "streaming": (False, True)}
    case = make_decode_case(positions=(1500, 800), **shape).to("cuda")
    run(gpu_decode_attention, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gpu_decode_attention.decode_attention(case.query, case.layer, case.batch, case.selection)
    other = make_decode_case(positions=(1407, 64), **shape).to("cuda")
    for name in ("retrieval_pool", "streaming_pool"):
        target, source = getattr(case.layer, name), getattr(other.layer, name)
        target[: source.shape[0]] = source
    case.layer.tail_key.copy_(other.layer.tail_key)
    case.layer.tail_value.copy_(other.layer.tail_value)
    case.query.copy_(other.query)
    for name in ("rows", "positions", "budget_pages"):
        getattr(case.batch, name).copy_(getattr(other.batch, name))
    for name in ("retrieval_table", "streaming_table"):
        source = getattr(other.batch, name)
        getattr(case.batch, name)[:, : source.shape[1]] = source
    graph.replay()
    assert torch.equal(
        out, gpu_decode_attention.decode_attention(other.query, other.layer, other.batch, other.selection)
    )
