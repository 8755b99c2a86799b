"""The engine's settings, as frozen dataclasses. `deployments/settings.py` fills them from YAML and flags."""

from dataclasses import dataclass, field
from typing import Literal

from .errors import SettingsError

PAGE_SIZE = 64
"""Tokens per page: the unit of allocation, quantization, selection, transfer and prefix caching."""

RESUME_INTERVAL = 1024
"""Tokens between the places where a cached prefix may be taken up."""

BLOCK_SIZE = 128
"""Tokens per query or key block of prefill attention; chunks and resume points are multiples of it."""

KvDtype = Literal["float32", "bf16", "int8", "k8v4", "int4"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]
SelectionRule = Literal["two_stage", "min_max"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder family: Llama, Mistral, Qwen2, Qwen3.

    rope_scaling holds the checkpoint's own keys (`rope_type`: default, linear, llama3, yarn). rope_frequency_factors,
    one per channel pair, divide the frequencies instead where a GGUF file brings them.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope_theta: float
    rms_norm_eps: float
    rope_scaling: tuple[tuple[str, float | int | str | bool], ...] = ()
    rope_frequency_factors: tuple[float, ...] = ()
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class SparsityConfig:
    """Which tokens attention reads (DESIGN.md section 4).

    token_budget: tokens a retrieval head may read in a decode step; None reads everything.
    max_token_budget: the most that a request may ask for instead.
    rule: two_stage, or min_max: the first stage alone, which is LServe's own rule (its logical pages have 16 tokens).
    prefill_sparse_from: query blocks at or past this position use the block estimator; None never does.
    prefill_threshold: a key block stays when its score is at least this fraction of its row's largest.
    prefill_budget: the share of its row's key blocks that stays instead, the best ones; None goes by the threshold.
    """

    token_budget: int | None = 8192
    max_token_budget: int = 16384
    candidate_factor: int = 4
    reselect_interval: int = 4
    rule: SelectionRule = "two_stage"
    sink_size: int = 128
    local_window: int = 256
    head_profile: str | None = None
    prefill_sparse_from: int | None = None
    prefill_threshold: float = 0.05
    prefill_budget: float | None = None

    def __post_init__(self) -> None:
        if self.reselect_interval < 1 or PAGE_SIZE % self.reselect_interval:
            raise SettingsError(f"sparsity.reselect_interval must divide {PAGE_SIZE}, got {self.reselect_interval}")
        for name, value in (("sink_size", self.sink_size), ("local_window", self.local_window)):
            if value <= 0 or value % PAGE_SIZE:
                raise SettingsError(f"sparsity.{name} must be a positive multiple of {PAGE_SIZE}, got {value}")
        if self.prefill_budget is not None and not 0 < self.prefill_budget <= 1:
            raise SettingsError(f"sparsity.prefill_budget must be above 0 and at most 1, got {self.prefill_budget}")
        if self.candidate_factor < 1:
            raise SettingsError(f"sparsity.candidate_factor must be at least 1, got {self.candidate_factor}")
        if self.token_budget is not None and self.token_budget > self.max_token_budget:
            raise SettingsError(
                f"sparsity.token_budget {self.token_budget} is over max_token_budget {self.max_token_budget}"
            )
        for name, budget in (("token_budget", self.token_budget), ("max_token_budget", self.max_token_budget)):
            if budget is not None and budget < self.min_token_budget:
                raise SettingsError(
                    f"sparsity.{name} must be at least {self.min_token_budget} (sink, window, two pages), got {budget}"
                )

    @property
    def min_token_budget(self) -> int:
        """Sink, window, the own page and one more: less leaves nothing to select."""
        return self.sink_size + self.local_window + 2 * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Pages and pools. Pool sizes are bytes; None lets the engine choose from free memory."""

    kv_dtype: KvDtype = "int4"
    logical_page_size: int = 32
    retrieval_pool_bytes: int | None = None
    streaming_pool_bytes: int | None = None
    host_swap_bytes: int = 1 << 30
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.logical_page_size not in (16, 32, 64):
            raise SettingsError(f"cache.logical_page_size must be 16, 32 or 64, got {self.logical_page_size}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How steps are filled. chunk_size: prompt tokens of one prefill step; max_batch_size: decoding choices at once."""

    chunk_size: int = 1024
    max_batch_size: int = 32
    max_model_len: int | None = None
    max_waiting: int = 256

    def __post_init__(self) -> None:
        if self.chunk_size < BLOCK_SIZE or self.chunk_size % BLOCK_SIZE:
            raise SettingsError(
                f"prefill.chunk_size must be a positive multiple of {BLOCK_SIZE}, got {self.chunk_size}"
            )
        for name, value in (("max_batch_size", self.max_batch_size), ("max_waiting", self.max_waiting)):
            if value < 1:
                raise SettingsError(f"decode.{name} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that one engine needs beside the weights. model: local directory, Hugging Face id or GGUF file.

    calibrate: fit low-bit weights to what they are multiplied by, once per model and format (`CalibratedWeights`).
    gpu_share: the part of a GPU that this worker may fill, where several share one.
    """

    model: str
    device: str = "cpu"
    compute_dtype: ComputeDtype | None = None
    weights: Literal["native", "fp8", "int8", "w4a8"] = "native"
    calibrate: bool = True
    cache: CacheConfig = field(default_factory=CacheConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    seed: int = 0
    gpu_share: float = 1.0
