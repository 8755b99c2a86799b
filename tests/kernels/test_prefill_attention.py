"""Prefill attention: CPU path and kernels against float64, the page rule, causality to the bit, the window's edge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_cases import make_prefill_case, random_lists, relative_error

from lserve.kernels import prefill_attention as launcher
from lserve.kernels.cpu import prefill_attention as cpu
from lserve.kernels.gpu import prefill_attention as gpu
from lserve.kernels.oracle import prefill as oracle

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
PATHS = pytest.mark.parametrize("path", [cpu, gpu], ids=["cpu", "triton"])


def path_device(path) -> str:
    return "cuda" if path is gpu and torch.cuda.is_available() else "cpu"


def poison_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the output start as NaN, so that an unwritten element is found."""
    for module in (cpu, gpu):
        monkeypatch.setattr(module.torch, "empty_like", lambda x: torch.full_like(x, torch.nan))


@PATHS
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_ragged_batches_of_both_classes_match_float64(path, data):
    requests = data.draw(
        st.lists(st.tuples(st.sampled_from([0, 128, 256]), st.integers(1, 150)), min_size=1, max_size=2)
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    case = make_prefill_case(
        [start for start, _ in requests],
        [length for _, length in requests],
        streaming=data.draw(st.sampled_from([[False], [True], [True, False]])),
        group_size=data.draw(st.sampled_from([1, 2])),
        head_dim=data.draw(st.sampled_from([16, 24])),
        dtype=dtype,
        sink_size=data.draw(st.sampled_from([0, 1, 64, 100, 128])),
        local_window=data.draw(st.sampled_from([1, 63, 64, 65, 200, 256])),
        device=path_device(path),
    )
    lists = random_lists(case) if data.draw(st.booleans()) else None
    out = path.prefill_attention(*case.arguments, lists)
    assert relative_error(out, oracle.prefill_attention(*case.arguments, lists)) < TOLERANCE[dtype]


@PATHS
def test_causal_to_the_bit(path):
    case = make_prefill_case([128], [150], streaming=[False, True], group_size=2, device=path_device(path))
    before = path.prefill_attention(*case.arguments, None)
    for last in (0, 63, 70, 149):
        changed = make_prefill_case([128], [150], streaming=[False, True], group_size=2, device=path_device(path))
        for name in ("query", "key", "value"):
            getattr(changed, name)[: last + 1] = getattr(case, name)[: last + 1]
        own_page = (128 + last) // 64 * 64
        changed.scratch_key[:, :own_page] = case.scratch_key[:, :own_page]
        changed.scratch_value[:, :own_page] = case.scratch_value[:, :own_page]
        after = path.prefill_attention(*changed.arguments, None)
        assert torch.equal(after[: last + 1], before[: last + 1])
        assert last == 149 or not torch.equal(after[last + 1], before[last + 1])


@PATHS
def test_the_own_page_is_read_as_written_and_earlier_ones_as_decoded(path):
    case = make_prefill_case([0], [160], streaming=[False], device=path_device(path))
    case.value.fill_(1.0)
    case.scratch_value.fill_(2.0)
    case.query.zero_()
    out = path.prefill_attention(*case.arguments, None)[:, 0, 0]
    position = torch.arange(160, device=out.device)
    decoded = position // 64 * 64
    torch.testing.assert_close(out, (decoded * 2.0 + (position - decoded + 1)) / (position + 1))


@PATHS
@pytest.mark.parametrize("local_window", [1, 64, 65, 130])
def test_a_streaming_head_stops_exactly_at_the_window(path, local_window):
    case = make_prefill_case(
        [256], [140], streaming=[True], sink_size=70, local_window=local_window, device=path_device(path)
    )
    case.query.zero_()
    case.value.copy_((torch.arange(140, device=case.value.device) + 256)[:, None, None].expand(case.value.shape))
    positions = torch.arange(case.scratch_value.shape[1], device=case.value.device, dtype=torch.float32)
    case.scratch_value.copy_(torch.where(case.scratch_value.isnan(), torch.nan, positions[:, None]))
    out = path.prefill_attention(*case.arguments, None)[:, 0, 0]
    token = torch.arange(396, device=out.device)
    position = token[256:, None]
    seen = (token <= position) & ((token < 70) | (position - token < local_window))
    torch.testing.assert_close(out, (seen * token).sum(1) / seen.sum(1), rtol=1e-5, atol=1e-3)


@PATHS
@pytest.mark.filterwarnings("ignore:.*NaN.*:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_one_requests_nan_stays_its_own_and_every_row_is_written(path, monkeypatch):
    case = make_prefill_case([0, 128], [70, 75], streaming=[False, True], group_size=2, device=path_device(path))
    expected = oracle.prefill_attention(*case.arguments)
    for name in ("query", "key", "value"):
        getattr(case, name)[70:] = torch.nan
    poison_out(monkeypatch)
    out = path.prefill_attention(*case.arguments, None)
    assert relative_error(out[:70], expected[:70]) < 1e-5


@PATHS
def test_empty_batches_and_strided_inputs(path):
    device = path_device(path)
    empty = make_prefill_case([], [], streaming=[False], device=device)
    assert path.prefill_attention(*empty.arguments, None).shape == (0, 1, 16)
    case = make_prefill_case([128], [20], streaming=[False], group_size=2, device=device)
    fused = torch.cat((case.query, case.key, case.value), dim=1)
    query, key, value = fused.split((2, 1, 1), dim=1)
    out = path.prefill_attention(query, key, value, *case.arguments[3:], None)
    assert relative_error(out, oracle.prefill_attention(*case.arguments)) < 1e-5


def test_scratches_of_different_strides_are_refused():
    case = make_prefill_case([0], [40], streaming=[False, False])
    arguments = list(case.arguments)
    arguments[4] = case.scratch_value.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="scratch strides must be equal"):
        gpu.prefill_attention(*arguments, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_tiles_read_by_pointer_for_cards_without_tensor_memory_access(streaming):
    device = path_device(gpu)
    case = make_prefill_case(
        [128],
        [70],
        streaming=[streaming],
        group_size=2,
        head_dim=24,
        local_window=100,
        dtype=torch.float16,
        device=device,
    )
    out = torch.full_like(case.query, torch.nan)
    heads = torch.zeros(1, dtype=torch.int64, device=device)
    tiles = gpu.query_tiles(case.batch, out.device)
    gpu.launch(*case.arguments[:5], out, case.layer, heads, tiles, None, streaming=streaming, capability=8)
    assert relative_error(out, oracle.prefill_attention(*case.arguments)) < TOLERANCE[torch.float16]


def test_the_launcher_takes_cpu_tensors():
    case = make_prefill_case([0], [40], streaming=[False])
    out = launcher.prefill_attention(*case.arguments)
    assert relative_error(out, oracle.prefill_attention(*case.arguments)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["chosen", "portable"])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_shape_on_the_card(kernel, group_size, head_dim, monkeypatch):
    if kernel == "portable":
        if head_dim not in (64, 128):
            pytest.skip("the portable kernel is the chosen one")
        monkeypatch.setattr(gpu, "_hopper", lambda *_: None)
    poison_out(monkeypatch)
    dtype = torch.float16 if group_size == 3 else torch.bfloat16
    case = make_prefill_case(
        [0, 1024, 256, 640],
        [520, 257, 64, 1],
        streaming=[False, True],
        group_size=group_size,
        head_dim=head_dim,
        dtype=dtype,
        sink_size=100 if group_size == 7 else 128,
        local_window=130 if group_size == 7 else 256,
        device="cuda",
    )
    for lists in (None, random_lists(case)):
        out = launcher.prefill_attention(*case.arguments, lists)
        assert relative_error(out, oracle.prefill_attention(*case.arguments, lists)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_float32_on_the_card(head_dim):
    case = make_prefill_case(
        [128, 0], [300, 70], streaming=[False, True], group_size=2, head_dim=head_dim, device="cuda"
    )
    for lists in (None, random_lists(case)):
        out = launcher.prefill_attention(*case.arguments, lists)
        assert relative_error(out, oracle.prefill_attention(*case.arguments, lists)) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_rows_repeat_to_the_bit_on_the_card(head_dim):
    case = make_prefill_case(
        [8192], [2048], streaming=[False], group_size=4, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    out = launcher.prefill_attention(*case.arguments)
    assert relative_error(out, oracle.prefill_attention(*case.arguments)) < TOLERANCE[torch.bfloat16]
    for _ in range(20):
        assert torch.equal(launcher.prefill_attention(*case.arguments), out)
