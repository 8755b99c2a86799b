"""The prefill block estimator: shares and choices against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_cases import PrefillCase, make_prefill_case

from lserve.kernels import prefill_blocks as launcher
from lserve.kernels.cpu import prefill_blocks as cpu
from lserve.kernels.gpu import prefill_blocks as gpu
from lserve.kernels.oracle import prefill as oracle
from lserve.kernels.views import BlockLists

BLOCK = 128
PATHS = pytest.mark.parametrize("path", [cpu, gpu], ids=["cpu", "triton"])


def path_device(path) -> str:
    return "cuda" if path is gpu and torch.cuda.is_available() else "cpu"


def choose(path, case: PrefillCase, sparse_from: int, threshold: float | None, budget: float | None) -> BlockLists:
    arguments = (case.query, case.key, case.scratch_key, case.layer, case.batch)
    return path.prefill_blocks(*arguments, sparse_from, threshold, budget)


def check(
    case: PrefillCase, lists: BlockLists, sparse_from: int, threshold: float | None, budget: float | None
) -> None:
    """Every list equals the oracle's, up to blocks whose share lies within rounding of the cut."""
    slack = 1e-4 if case.query.dtype == torch.float32 else 1e-2
    positions = [s + i for s, n in zip(case.batch.starts, case.batch.lengths, strict=True) for i in range(0, n, BLOCK)]
    shares = oracle.block_shares(case.query, case.scratch_key, case.layer, case.batch, cpu.STRIDE)
    assert lists.counts.shape == (len(positions), case.query.shape[1])
    for row, position in enumerate(positions):
        for head in case.retrieval_query_heads:
            share = shares[row][head]
            expected = oracle.kept_blocks(share, position, case.layer, sparse_from, threshold, budget)
            count = int(lists.counts[row, head])
            found = lists.blocks[row, head, :count].tolist()
            assert found == sorted(set(found))
            assert found[-1] == position // BLOCK
            if found == expected:
                continue
            near = set(found) ^ set(expected)
            if threshold is not None:
                cut = threshold * float(share.max())
            else:
                assert count == len(expected)
                cut = min(float(share[b]) for b in expected if b in near)
            assert all(abs(float(share[b]) - cut) <= slack * float(share.max()) for b in near)


@PATHS
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_choices_match_float64(path, data):
    requests = data.draw(
        st.lists(st.tuples(st.sampled_from([0, 128, 640, 1024]), st.integers(1, 290)), min_size=1, max_size=2)
    )
    case = make_prefill_case(
        [start for start, _ in requests],
        [length for _, length in requests],
        streaming=data.draw(st.sampled_from([[False], [True, False]])),
        group_size=data.draw(st.sampled_from([1, 2])),
        head_dim=data.draw(st.sampled_from([16, 24])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16])),
        sink_size=data.draw(st.sampled_from([0, 100, 128])),
        local_window=data.draw(st.sampled_from([1, 100, 256])),
        device=path_device(path),
    )
    threshold, budget = data.draw(
        st.sampled_from([(0.0, None), (0.9, None), (2.0, None), (None, 0.01), (None, 0.3), (None, 0.5), (None, 1.0)])
    )
    sparse_from = data.draw(st.sampled_from([0, 500, 2**30]))
    check(case, choose(path, case, sparse_from, threshold, budget), sparse_from, threshold, budget)


@PATHS
def test_equal_shares_go_to_the_lower_index(path):
    case = make_prefill_case([1024], [128], streaming=[False], sink_size=1, local_window=1, device=path_device(path))
    case.query.zero_()
    lists = choose(path, case, 0, None, 0.4)
    assert lists.blocks[0, 0, : lists.counts[0, 0]].tolist() == [0, 1, 2, 8]


@PATHS
def test_a_planted_block_is_found(path):
    case = make_prefill_case([1024], [256], streaming=[False], sink_size=64, local_window=64, device=path_device(path))
    case.query.copy_(torch.randn(16, device=case.query.device).expand(case.query.shape) * 4)
    case.scratch_key[0, 5 * BLOCK : 6 * BLOCK] = case.query[0, 0]
    lists = choose(path, case, 0, 0.5, None)
    assert lists.blocks[0, 0, : lists.counts[0, 0]].tolist() == [0, 5, 7, 8]
    assert lists.blocks[1, 0, : lists.counts[1, 0]].tolist() == [0, 5, 8, 9]


@PATHS
def test_empty_batches(path):
    case = make_prefill_case([], [], streaming=[False], device=path_device(path))
    assert choose(path, case, 0, 0.5, None).counts.shape == (0, 1)


@pytest.mark.parametrize(("threshold", "budget"), [(None, None), (0.1, 0.1)])
def test_exactly_one_rule_is_given(threshold, budget):
    case = make_prefill_case([0], [10], streaming=[False])
    with pytest.raises(ValueError, match="either threshold or budget"):
        choose(launcher, case, 0, threshold, budget)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("threshold", "budget"), [(0.95, None), (None, 0.3)])
def test_every_head_size_on_the_card(dtype, head_dim, threshold, budget):
    case = make_prefill_case(
        [2048, 0], [390, 700], streaming=[True, False], group_size=3, head_dim=head_dim, dtype=dtype, device="cuda"
    )
    check(case, choose(launcher, case, 256, threshold, budget), 256, threshold, budget)
