"""Page selection: the same pages as the oracle's up to near ties at the cut, and bounds that hold for every decoded
key.
"""

import pytest
import torch
from attention_cases import DecodeCase, make_decode_case, without_poison
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import page_select
from lserve.kernels.gpu import page_select as gpu_page_select
from lserve.kernels.oracle import decode as oracle
from lserve.kernels.oracle import kv as kv_oracle
from lserve.kernels.slot_layout import NUM_LEVELS

UNWRITTEN = -77


def assert_equal_up_to_ties(pages: list[int], choice: oracle.PageChoice, scores: dict[int, float], near: float):
    """Pages in one choice but not the other score within `near` of the cut."""
    assert pages == sorted(set(pages)) and len(pages) == len(choice.pages)
    assert set(choice.always) <= set(pages)
    cut = min((scores[p] for p in choice.pages if p in scores), default=0.0)
    for page in set(pages) ^ set(choice.pages):
        assert abs(scores.get(page, cut) - cut) <= near


def check(path, case: DecodeCase, device: str, factor: int, two_stage: bool, near: float = 1e-5):
    case.selection.pages.fill_(UNWRITTEN)
    case.selection.counts.fill_(UNWRITTEN)
    moved = case.to(device)
    path.page_select(moved.query, moved.layer, moved.batch, moved.selection, factor, two_stage)
    pages, counts = moved.selection.pages.cpu(), moved.selection.counts.cpu()
    written = torch.zeros_like(counts, dtype=torch.bool)
    for b, row in enumerate(case.batch.rows.tolist()):
        fits = int(case.batch.positions[b]) // 64 + 1 <= int(case.batch.budget_pages[b])
        if fits or not case.batch.reselect[b]:
            continue
        for head in case.layer.retrieval_heads.tolist():
            written[row, head] = True
            choice = oracle.choose_pages(case.query, case.layer, case.batch, b, head, factor, two_stage)
            scores = choice.shares if two_stage else choice.bounds
            assert_equal_up_to_ties(pages[row, head, : counts[row, head]].tolist(), choice, scores, near)
    assert (counts[~written] == UNWRITTEN).all() and (pages[~written] == UNWRITTEN).all()


SHAPES = {
    "head_dim": st.sampled_from([16, 64, 80]),
    "group_size": st.sampled_from([1, 2, 3, 7]),
    "positions": st.lists(st.integers(0, 1600), min_size=1, max_size=3).map(tuple),
    "streaming": st.sampled_from([(False,), (False, True), (True, False, False)]),
    "logical_page_size": st.sampled_from([16, 32, 64]),
    "budget": st.integers(6, 12),
    "factor": st.integers(1, 4),
    "two_stage": st.booleans(),
    "seed": st.integers(0, 99),
}


def draw(kv_dtype, head_dim, group_size, positions, streaming, logical_page_size, budget, seed, **more) -> DecodeCase:
    torch.manual_seed(seed)
    return make_decode_case(
        kv_dtype=kv_dtype, head_dim=head_dim, group_size=group_size, positions=positions, streaming=streaming,
        budgets=(budget,) * len(positions), logical_page_size=logical_page_size, sink_size=64, local_window=128,
        selection_width=16, **more,
    )  # fmt: skip


@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@settings(deadline=None, max_examples=5)
@given(**SHAPES)
def test_kernel_chooses_the_oracles_pages(device, kv_dtype, factor, two_stage, **shape):
    check(gpu_page_select, draw(kv_dtype, **shape), device, factor, two_stage)


@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@settings(deadline=None, max_examples=8)
@given(**SHAPES)
def test_cpu_path_chooses_the_oracles_pages(kv_dtype, factor, two_stage, **shape):
    check(page_select, without_poison(draw(kv_dtype, **shape)), "cpu", factor, two_stage)


def test_cpu_path_takes_long_sequences_by_themselves(monkeypatch):
    monkeypatch.setattr("lserve.kernels.cpu.codec.PART", 1)
    case = draw("int4", 64, 2, (1200, 1300, 1400), (False, True), 32, 7, 1)
    check(page_select, without_poison(case), "cpu", 4, True)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_cpu_path_chooses_among_shared_pages(factor):
    case = without_poison(draw("int4", 64, 2, (1200, 1300, 1400), (False, True), 32, 7, 1))
    case.batch.retrieval_table[1:, :17] = case.batch.retrieval_table[0, :17]
    check(page_select, case, "cpu", factor, True)


def test_only_sequences_told_to_choose_do(device):
    case = draw("int4", 64, 2, (1200, 1300, 1400), (False, False), 32, 7, 1)
    case.batch.reselect.copy_(torch.tensor([False, True, False]))
    check(gpu_page_select, case, device, 4, True)
    case.batch.reselect.fill_(False)
    check(gpu_page_select, case, device, 4, True)


def test_ties_go_to_the_lower_page(device):
    """All pages alike: the choice is the first ones, beside sink and window."""
    case = draw("int4", 64, 2, (1280,), (False,), 32, 8, 3)
    case.layer.retrieval_pool[:] = case.layer.retrieval_pool[int(case.batch.retrieval_table[0, 0])]
    for two_stage in (True, False):
        check(gpu_page_select, case, device, 1, two_stage, near=0.0)


@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@pytest.mark.parametrize("logical_page_size", [16, 32, 64])
def test_bounds_cover_every_decoded_key(kv_dtype, logical_page_size):
    case = draw(kv_dtype, 64, 3, (1000,), (False,), logical_page_size, 8, 5)
    choice = oracle.choose_pages(case.query, case.layer, case.batch, 0, 0)
    for page, bound in choice.bounds.items():
        slot = case.layer.retrieval_pool[int(case.batch.retrieval_table[0, page]), 1]
        scores = case.query[0].double() * case.layer.scale @ kv_oracle.decode_slot(slot, case.layer.layout)[0].T
        assert scores.max() <= bound + 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", NUM_LEVELS)
@pytest.mark.parametrize(
    "head_dim,group_size,logical_page_size", [(64, 3, 32), (80, 2, 16), (96, 4, 64), (128, 4, 32), (256, 7, 32)]
)
@pytest.mark.parametrize("two_stage", [True, False])
def test_shapes_on_the_card(kv_dtype, head_dim, group_size, logical_page_size, two_stage):
    """In float32 as close as anywhere; in bf16 keys are rounded to half precision, which moves shares by about a
    hundredth.
    """
    torch.manual_seed(7)
    shape = (head_dim, group_size, (5000, 0, 3000, 511), (False, True, False), logical_page_size, 12)
    check(gpu_page_select, draw(kv_dtype, *shape, 7), "cuda", 3, two_stage)
    if kv_dtype != "float32":
        case = draw(kv_dtype, *shape, 8, dtype=torch.bfloat16)
        check(gpu_page_select, case, "cuda", 3, two_stage, near=2e-3 if two_stage else 1e-4)
