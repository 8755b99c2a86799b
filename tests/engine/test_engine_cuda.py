"""Specifies the engine on a GPU: the same requests give the CPU engine's logits, through CUDA graphs and Triton."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import make_checkpoint

from lserve.engine import engine as engine_module
from lserve.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.loading import LoadedModel
from lserve.engine.page_format import make_page_format
from lserve.engine.pool_sizes import PoolSizes
from lserve.engine.request import AttentionOptions, Request, SampledToken, SamplingParams
from lserve.engine.weights import load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCABULARY = 512
MIXED = ((False, True), (True, True), (False, False))
ALL_RETRIEVAL = ((False, False),) * 3
LENGTHS = (1, 63, 64, 65, 300, 1000, 2100)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-cuda")
    make_checkpoint(path, "Llama", vocab_size=VOCABULARY, num_layers=3, max_position=4096, head_dim=64)
    return path


class Forced:
    """Takes the sampler's place: keeps the logits, and draws tokens that do not depend on them."""

    def __init__(self) -> None:
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, logits: torch.Tensor, rows: Any) -> list[SampledToken]:
        for row, values in zip(rows, logits, strict=True):
            self.logits[row.params.seed, row.position] = values.float().cpu()
        return [SampledToken((row.params.seed * 131 + row.position * 17) % VOCABULARY) for row in rows]


def run(
    checkpoint: Path,
    device: str,
    kv_dtype: str,
    streaming: tuple[tuple[bool, ...], ...],
    budget: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[tuple[int, int], torch.Tensor]:
    """Logits by (request, position) of seven requests of many lengths, 70 tokens each, in batches of at most 4."""
    forced = Forced()
    monkeypatch.setattr(engine_module, "sample", forced)
    model = load_model(str(checkpoint), device, torch.float32)
    cache = CacheConfig(kv_dtype=kv_dtype, prefix_cache=False)  # type: ignore[arg-type]
    sparsity = SparsityConfig(token_budget=budget, max_token_budget=1024, sink_size=64, local_window=128)
    scheduler = SchedulerConfig(chunk_size=512, max_batch_size=4, max_model_len=4096)
    config = EngineConfig(str(checkpoint), device=device, cache=cache, sparsity=sparsity, scheduler=scheduler)
    page_format = make_page_format(model.config, cache, sparsity, streaming, "tiny", "native", "float32")
    loaded = LoadedModel(model, Letters(), page_format, sparsity)  # type: ignore[arg-type]
    engine = Engine(config, loaded, sizes=PoolSizes(256, 256, 8))
    generator = torch.Generator().manual_seed(0)
    for seed, length in enumerate(LENGTHS):
        prompt = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        params = SamplingParams(max_tokens=70, ignore_eos=True, seed=seed)
        attention = AttentionOptions(dense=seed % 3 == 2)
        engine.add_request(Request(f"r{seed}", tuple(prompt), params, attention))
    while engine.has_work:
        assert not engine.step().errors
    assert engine.retrieval_pool.num_held == engine.streaming_pool.num_held == engine.row_pool.num_held == 0
    return forced.logits


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, token_ids: Any) -> str:
        return "".join(chr(0x4E00 + token_id) for token_id in token_ids)


@pytest.mark.parametrize("budget", [None, 384])
@pytest.mark.parametrize("streaming", [ALL_RETRIEVAL, MIXED], ids=["retrieval", "mixed"])
@pytest.mark.parametrize("kv_dtype", ["float32", "bf16", "int8", "k8v4", "int4"])
def test_a_gpu_computes_what_a_cpu_computes(
    checkpoint: Path,
    kv_dtype: str,
    streaming: tuple[tuple[bool, ...], ...],
    budget: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = run(checkpoint, "cuda", kv_dtype, streaming, budget, monkeypatch)
    theirs = run(checkpoint, "cpu", kv_dtype, streaming, budget, monkeypatch)
    assert ours.keys() == theirs.keys() and len(ours) == 70 * len(LENGTHS)
    errors = torch.stack([(ours[key] - theirs[key]).abs().max() for key in sorted(ours)])
    # A code that rounds the other way moves a logit a little; a page that is chosen differently, more.
    assert errors.median() < 1e-3, errors.median()
    assert errors.quantile(0.98) < (1e-3 if kv_dtype == "float32" and budget is None else 3e-2), errors.topk(5)
