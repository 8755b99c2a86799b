"""Traces on a GPU: they change no logit beside what a step without its graph does, and say what a CPU engine says."""

from pathlib import Path

import pytest
import torch
from test_engine_cuda import MIXED, VOCABULARY, Forced, make_engine
from tiny_checkpoints import make_checkpoint

from lserve.engine import engine as engine_module
from lserve.engine.request import AttentionOptions, PageChoice, Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-trace")
    make_checkpoint(path, "Llama", vocab_size=VOCABULARY, num_layers=3, max_position=4096, head_dim=64)
    return path


def answered(
    checkpoint: Path, device: str, trace: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[tuple[int, int], torch.Tensor], list[PageChoice]]:
    """Logits of one request beside another, and its page choices."""
    forced = Forced()
    monkeypatch.setattr(engine_module, "sample", forced)
    engine = make_engine(checkpoint, device, "int4", MIXED, 384)
    generator = torch.Generator().manual_seed(3)
    choices: list[PageChoice] = []
    for seed, length in enumerate((1500, 900)):
        prompt = tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())
        params = SamplingParams(max_tokens=30, ignore_eos=True, seed=seed)
        engine.add_request(Request(f"r{seed}", prompt, params, AttentionOptions(trace=trace and seed == 0)))
    while engine.has_work:
        choices += [choice for output in engine.step().outputs for choice in output.trace]
    return forced.logits, choices


def test_a_trace_on_a_gpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, none = answered(checkpoint, "cuda", False, monkeypatch)
    traced, choices = answered(checkpoint, "cuda", True, monkeypatch)
    _, on_cpu = answered(checkpoint, "cpu", True, monkeypatch)
    assert none == [] and plain.keys() == traced.keys()
    for key, logits in plain.items():
        torch.testing.assert_close(traced[key], logits, atol=1e-2, rtol=0)
    assert [choice.token for choice in choices] == [choice.token for choice in on_cpu]
    for ours, theirs in zip(choices, on_cpu, strict=True):
        assert sum(count for _, count in ours.read) == sum(count for _, count in theirs.read)
        assert (ours.mass_kept is None) == (theirs.mass_kept is None)
        if ours.mass_kept is not None and theirs.mass_kept is not None:
            assert ours.mass_kept == pytest.approx(theirs.mass_kept, abs=0.05)
    same = sum(dict(a.read) == dict(b.read) for a, b in zip(choices, on_cpu, strict=True))
    assert same >= len(choices) // 2, "choices near the cut may differ, most do not"
