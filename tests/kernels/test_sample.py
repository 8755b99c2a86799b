"""Sampling: kernel and CPU path draw what the definition, written out row by row, allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lserve.kernels import sample
from lserve.kernels.gpu import sample as gpu_sample
from lserve.kernels.oracle import sample as oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = pytest.mark.parametrize("path", [sample, gpu_sample], ids=["launcher", "kernel"])
ROW = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    st.sampled_from([0, 1, 2, 7, 1000]),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.02, 0.5]),
    st.floats(0, 1, exclude_max=True),
)


def draw(path, logits, rows, **options):
    temperature, top_k, top_p, min_p, uniform = (list(column) for column in zip(*rows, strict=True))
    floats = [torch.tensor(values, dtype=torch.float32, device=DEVICE) for values in (temperature, top_p, min_p)]
    return path.sample(
        logits.to(DEVICE),
        floats[0],
        torch.tensor(top_k, dtype=torch.int32, device=DEVICE),
        floats[1],
        floats[2],
        torch.tensor(uniform, dtype=torch.float64, device=DEVICE),
        **options,
    ).tolist()


def check(logits, rows, tokens, slack=2e-6):
    for row, (temperature, top_k, top_p, min_p, uniform), token in zip(logits, rows, tokens, strict=True):
        if temperature == 0:
            assert token == oracle.greedy(row)
        else:
            weights = oracle.kept_weights(row, temperature, top_k, top_p, min_p)
            assert token in oracle.possible_tokens(weights, uniform, slack), (temperature, top_k, top_p, min_p, uniform)


@PATHS
@settings(deadline=None, max_examples=8)
@given(rows=st.lists(ROW, min_size=1, max_size=2), vocab_size=st.sampled_from([1, 5, 300, 1100]), coarse=st.booleans())
def test_draws_are_those_of_the_definition(path, rows, vocab_size, coarse):
    logits = torch.randn(len(rows), vocab_size) * 3
    # coarse logits tie, at the filters' edges too
    logits = logits.round() if coarse else logits
    check(logits, rows, draw(path, logits, rows))


@PATHS
def test_without_filters_the_search_is_not_needed(path):
    logits = torch.randn(2, 200) * 2
    rows = [(0.7, 0, 1.0, 0.1, 0.4), (1.3, 0, 1.0, 0.0, 0.93)]
    assert draw(path, logits, rows, filtered=False) == draw(path, logits, rows)
    check(logits, rows, draw(path, logits, rows, filtered=False))


@PATHS
def test_forbidden_tokens_are_never_drawn(path):
    logits = torch.full((2, 70), -torch.inf)
    logits[:, 31], logits[:, 64] = 1.0, 0.5
    rows = [(1.0, 0, 1.0, 0.0, 0.999999999), (1.0, 5, 0.99, 0.0, 0.0)]
    assert draw(path, logits, rows) == [64, 31]


@PATHS
def test_shares_of_the_unit_interval_lie_in_vocabulary_order(path):
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    numbers = [0.0, 0.05, 0.11, 0.49, 0.51, 0.69, 0.71, 0.99]
    logits = probabilities.log().repeat(len(numbers), 1)
    tokens = draw(path, logits, [(1.0, 0, 1.0, 0.0, number) for number in numbers])
    assert tokens == [0, 0, 1, 1, 2, 2, 3, 3]


@PATHS
def test_an_empty_batch(path):
    empty = torch.empty(0, dtype=torch.float32, device=DEVICE)
    out = path.sample(torch.empty(0, 8, device=DEVICE), empty, empty.int(), empty, empty, empty.double())
    assert out.shape == (0,) and out.dtype == torch.int64


def test_wrong_shapes_are_named():
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="logits must be float32"):
        sample.sample(torch.zeros(2, 3).half(), ones, ones.int(), ones, ones, ones.double())
    with pytest.raises(ValueError, match=r"top_k must be torch.int32 \(2,\)"):
        sample.sample(torch.zeros(2, 3), ones, ones, ones, ones, ones.double())


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [49152, 128256])
def test_on_the_card(vocab_size):
    logits = (torch.randn(12, vocab_size) * 2).bfloat16().float()
    rows = [
        (temperature, top_k, top_p, min_p, torch.rand(()).item())
        for temperature in (0.0, 0.8, 1.5)
        for top_k, top_p, min_p in ((0, 1.0, 0.0), (50, 0.9, 0.0), (0, 0.95, 0.01), (0, 0.5, 0.0))
    ]
    check(logits, rows, draw(sample, logits, rows), slack=1e-5)
    graph, ones = torch.cuda.CUDAGraph(), torch.ones(12, device="cuda")
    static = logits.cuda()
    arguments = (ones, ones.int() * 40, ones * 0.9, ones * 0, torch.rand(12, device="cuda", dtype=torch.float64))
    expected = sample.sample(static, *arguments)
    with torch.cuda.graph(graph):
        captured = sample.sample(static, *arguments)
    graph.replay()
    assert torch.equal(captured, expected)
