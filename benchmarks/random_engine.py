"""Engines over random weights and pages of random keys and values: a real model's work and traffic, no checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from lserve.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.loading import LoadedModel
from lserve.engine.model import Model
from lserve.engine.page_format import make_page_format
from lserve.engine.pool_sizes import PoolSizes
from lserve.engine.weights import build_model
from lserve.kernels.kv_write import write_pages

SHAPES = {
    "llama-3-8b": ModelConfig("llama", 32, 4096, 14336, 32, 8, 128, 128256, 1 << 20, 5e5, 1e-5),
    "tiny": ModelConfig("llama", 4, 256, 512, 8, 2, 64, 1024, 1 << 16, 5e5, 1e-5),
}
MAX_BATCH = 64


@dataclass
class RandomTensors:
    """A checkpoint of random weights, made one tensor at a time."""

    config: ModelConfig
    device: str
    shapes: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        layer = {
            "input_layernorm": (c.hidden_size,),
            "post_attention_layernorm": (c.hidden_size,),
            "self_attn.q_proj": (c.num_heads * c.head_dim, c.hidden_size),
            "self_attn.k_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
            "self_attn.v_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
            "self_attn.o_proj": (c.hidden_size, c.num_heads * c.head_dim),
            "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
            "mlp.up_proj": (c.intermediate_size, c.hidden_size),
            "mlp.down_proj": (c.hidden_size, c.intermediate_size),
        }
        all_layers = {f"model.layers.{i}.{n}.weight": s for i in range(c.num_layers) for n, s in layer.items()}
        vocabulary = (c.vocab_size, c.hidden_size)
        ends = {
            "model.embed_tokens.weight": vocabulary,
            "model.norm.weight": (c.hidden_size,),
            "lm_head.weight": vocabulary,
        }
        self.shapes = all_layers | ends

    def names(self) -> Iterable[str]:
        return self.shapes

    def read(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16).mul_(shape[1] ** -0.5)


class NoText:
    """Stands where a tokenizer stands; text is not what is measured."""

    def decode(self, token_ids: object) -> str:
        return ""


def random_model(shape: str, device: str, weights: str) -> Model:
    """Random weights of a shape, in bfloat16 on a GPU and float32 on a CPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    config = SHAPES[shape]
    return build_model(config, RandomTensors(config, device), torch.device(device), dtype, weights)


def random_engine(
    model: Model,
    weights: str,
    kv_dtype: str,
    tokens: int,
    chunk: int,
    token_budget: int = 8192,
    streaming: bool = True,
    prefill_budget: float | None = None,
) -> Engine:
    """An engine whose pools hold about `tokens` tokens in all, filled with random pages.

    streaming: every other head streams. prefill_budget: the share of key blocks that prefill reads; None reads all.
    """
    config, device = model.config, str(model.device)
    dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
    sparsity = SparsityConfig(
        token_budget=token_budget,
        max_token_budget=max(token_budget, 16384),
        prefill_sparse_from=None if prefill_budget is None else 0,
        prefill_budget=prefill_budget,
    )
    settings = EngineConfig(
        model="random",
        device=device,
        compute_dtype=dtype,
        weights=weights,
        cache=CacheConfig(kv_dtype=kv_dtype, prefix_cache=False),
        sparsity=sparsity,
        scheduler=SchedulerConfig(chunk_size=chunk, max_batch_size=MAX_BATCH),
    )
    heads = tuple(
        tuple(streaming and (head + layer) % 2 == 0 for head in range(config.num_kv_heads))
        for layer in range(config.num_layers)
    )
    page_format = make_page_format(config, settings.cache, sparsity, heads, "random", weights, dtype)
    sizes = PoolSizes(tokens // 64 + 64, 16 * MAX_BATCH + 2 * chunk // 64 if streaming else 0, MAX_BATCH)
    engine = Engine(settings, LoadedModel(model, NoText(), page_format, sparsity), sizes=sizes)
    fill(engine)
    return engine


@torch.inference_mode()
def fill(engine: Engine) -> None:
    """Random keys and values in every page of both pools."""
    layout, device = engine.page_format.layout, engine.cache.device
    for pool in (engine.cache.retrieval, engine.cache.streaming):
        if pool.numel():
            slots = torch.arange(pool.shape[1], device=device)
            shape = (16, 64, pool.shape[1], layout.head_dim)
            key, value = (torch.randn(shape, device=device, dtype=engine.cache.dtype) for _ in range(2))
            for first in range(0, pool.shape[0], 16):
                ids = torch.arange(first, min(first + 16, pool.shape[0]), device=device)
                write_pages(key[: len(ids)], value[: len(ids)], slots, pool, ids, slots, layout)
    engine.cache.tail.normal_()
