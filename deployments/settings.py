"""The settings: one schema for the `args:` block of a Serve config, of cluster.yaml and of `lserve up`.

This is the only YAML reader. Unknown keys and wrong values raise a one-line SettingsError that names both. Secrets do
not stand here: the settings hold the names of environment variables, and `secret()` reads them where they are used.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lserve.engine.config import CacheConfig, ComputeDtype, EngineConfig, SchedulerConfig, SparsityConfig
from lserve.engine.errors import SettingsError

Role = Literal["prefill", "decode"]
Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Section):
    """Which model. path: local directory, Hugging Face id or GGUF file. dtype None: bfloat16 on GPUs, else float32.

    calibrate: fit low-bit weights to the model's own activations; the first start takes minutes longer.
    """

    path: str = Field(min_length=1)
    served_name: str | None = Field(default=None, min_length=1)
    dtype: ComputeDtype | None = None
    weights: Literal["native", "fp8", "int8", "w4a8"] = "native"
    calibrate: bool = True
    seed: int = 0


class WorkerResources(_Section):
    """How many replicas of a role, and what Ray reserves for each. resources: custom ones, such as a node type's.

    min_replicas, max_replicas: bounds between which the number follows the load, from `replicas` on; None: `replicas`.
    drain_s: the longest that a replica which is shut down goes on with its requests and leases.
    """

    replicas: int = Field(default=1, ge=1)
    min_replicas: int | None = Field(default=None, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = {}
    drain_s: float = Field(default=30.0, ge=0)

    @property
    def least_replicas(self) -> int:
        """The fewest that there ever are."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def most_replicas(self) -> int:
        """The most that there ever are."""
        return self.replicas if self.max_replicas is None else self.max_replicas

    @property
    def is_autoscaled(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.least_replicas < self.most_replicas

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.least_replicas > self.replicas:
            raise ValueError(f"min_replicas must be at most {self.replicas}, the number of replicas to begin with")
        if self.most_replicas < self.replicas:
            raise ValueError(f"max_replicas must be at least {self.replicas}, the number of replicas to begin with")
        if self.replicas == 0 and self.most_replicas:
            raise ValueError("without replicas there can be no max_replicas")
        return self


class PrefillSettings(WorkerResources):
    """Prefill workers. replicas 0: decode workers prefill for themselves.

    local_threshold: a prompt with at most this many uncached tokens is prefilled by its decode worker.
    """

    replicas: int = Field(default=1, ge=0)
    chunk_size: int = 1024
    local_threshold: int = Field(default=512, ge=0)
    lease_s: float = Field(default=30.0, gt=0)
    timeout_s: float = Field(default=300.0, gt=0)


class DecodeSettings(WorkerResources):
    """Decode workers. max_batch_size: choices decoded at once; max_waiting: choices that wait in one worker.

    max_model_len: tokens of prompt and answer together; None takes the model's own limit.
    """

    max_batch_size: int = Field(default=32, ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    max_waiting: int = Field(default=256, ge=1)


class RouterSettings(WorkerResources):
    """The HTTP front. Limits are per router replica; times are seconds.

    api_keys_env: environment variable with comma-separated API keys; api_key_sha256: SHA-256 hashes of keys (hex).
        With neither, everyone may call.
    max_running_requests: requests at the workers at once; max_queued_requests: requests that wait here before 429.
    retries: how often a request is replayed on another worker after its own was lost.
    """

    num_cpus: float = Field(default=0.0, ge=0)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_keys_env: str = "LSERVE_API_KEYS"
    api_key_sha256: tuple[Sha256Hex, ...] = ()
    max_running_requests: int = Field(default=256, ge=1)
    max_queued_requests: int = Field(default=256, ge=0)
    retry_after_s: float = Field(default=1.0, gt=0)
    request_timeout_s: float = Field(default=600.0, gt=0)
    retries: int = Field(default=3, ge=0)
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    max_choices: int = Field(default=16, ge=1)
    max_prompts: int = Field(default=64, ge=1)


class AutoscalingSettings(_Section):
    """What the number of workers follows, where a role has max_replicas above min_replicas.

    ttft_target_s: of nine requests in ten, from the decode worker's receipt on. itl_target_s: mean. page_use, busy:
    the shares of pages and of prefill time to be used. shrink_after_s: how long fewer must have been enough.
    """

    ttft_target_s: float = Field(default=10.0, gt=0)
    itl_target_s: float = Field(default=0.05, gt=0)
    page_use: float = Field(default=0.85, gt=0, le=1)
    busy: float = Field(default=0.7, gt=0, le=1)
    shrink_after_s: float = Field(default=600.0, ge=0)


class RedisSettings(_Section):
    """Where prefix pages are kept. url None: no Redis (`lserve up` starts an embedded Valkey and fills it in).

    url: redis://, rediss:// or unix://, without a password; that comes from `password_env`. ca: what a server
    reached by rediss:// must descend from, as PEM or the path of a PEM file; None trusts the system's authorities.
    secret_env: the cluster's secret, which names and authenticates pages. ttl_s: how long a page lives after its last
    write. timeout_s: the longest that a request waits for Redis.
    """

    url: str | None = None
    ca: str | None = Field(default=None, min_length=1)
    password_env: str = "LSERVE_REDIS_PASSWORD"
    secret_env: str = "LSERVE_CLUSTER_SECRET"
    ttl_s: int = Field(default=24 * 3600, ge=1)
    timeout_s: float = Field(default=0.5, gt=0)
    max_pending_bytes: int = Field(default=256 << 20, ge=0)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must start with redis://, rediss:// or unix://")
        if parts.password is not None:
            raise SettingsError("redis.url must not hold a password: redis.password_env names the variable that does")
        return url


class Settings(_Section):
    """Everything that the cluster needs to know, and `build(args)` gets."""

    model: ModelSettings
    cache: CacheConfig = CacheConfig()
    sparsity: SparsityConfig = SparsityConfig()
    prefill: PrefillSettings = PrefillSettings()
    decode: DecodeSettings = DecodeSettings()
    router: RouterSettings = RouterSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    redis: RedisSettings = RedisSettings()

    @model_validator(mode="after")
    def _check_engine(self) -> "Settings":
        self.engine_config()
        return self

    @property
    def served_name(self) -> str:
        """The model id in the API: as set, else a file's or directory's name, else the Hugging Face id."""
        if self.model.served_name is not None:
            return self.model.served_name
        path = Path(self.model.path)
        return path.name.removesuffix(".gguf") if path.is_absolute() or path.exists() else self.model.path

    def engine_config(self, role: Role = "decode") -> EngineConfig:
        """The engine's own settings for a worker of this role: on a GPU when the role reserves one."""
        worker = self.prefill if role == "prefill" else self.decode
        return EngineConfig(
            model=self.model.path,
            device="cuda" if worker.num_gpus else "cpu",
            gpu_share=min(worker.num_gpus, 1.0) or 1.0,
            compute_dtype=self.model.dtype,
            weights=self.model.weights,
            calibrate=self.model.calibrate,
            cache=self.cache,
            sparsity=self.sparsity,
            scheduler=SchedulerConfig(
                chunk_size=self.prefill.chunk_size,
                max_batch_size=self.decode.max_batch_size,
                max_model_len=self.decode.max_model_len,
                max_waiting=self.decode.max_waiting,
            ),
            seed=self.model.seed,
        )


def load_settings(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Settings:
    """Settings from a YAML file or an `args:` block, changed by overrides such as `decode.max_batch_size=8`.

    The file holds either the block itself, or `args:` with the block, or a Serve config whose only application has it.
    Override values are read as YAML. Raises SettingsError.
    """
    block = _read(source) if isinstance(source, str | os.PathLike) else dict(source or {})
    for override in overrides:
        block = _override(block, override)
    try:
        return Settings.model_validate(block)
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None


def secret(variable: str) -> str | None:
    """The secret in an environment variable; None when it is unset or empty."""
    return os.environ.get(variable) or None


def cluster_secret(settings: Settings) -> bytes:
    """What names and authenticates pages in Redis. Raises SettingsError when there is a Redis but no secret."""
    value = secret(settings.redis.secret_env)
    if value is None and settings.redis.url is not None:
        raise SettingsError(f"redis.url is set, so the environment must have a secret in {settings.redis.secret_env}")
    return (value or "").encode()


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"cannot read settings from {os.fspath(path)!r}: {reason}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{os.fspath(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, dict) and "applications" in content:
        applications = content["applications"]
        if not (isinstance(applications, list) and len(applications) == 1 and isinstance(applications[0], dict)):
            raise SettingsError(f"{os.fspath(path)!r}: applications must be a list of exactly one application")
        content = applications[0]
    if isinstance(content, dict) and "args" in content:
        content = content["args"]
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{os.fspath(path)!r} must hold a mapping of settings, got {type(content).__name__}")
    return content


def _override(block: Mapping[str, Any], override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise SettingsError(f"an override is written section.key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"{name}: the value is not YAML: {text!r}") from None
    return _replaced(block, keys, value)


def _replaced(block: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    if len(keys) == 1:
        return {**block, keys[0]: value}
    inner = block.get(keys[0]) or {}
    if not isinstance(inner, Mapping):
        raise SettingsError(f"{keys[0]} must be a mapping, got {inner!r}")
    return {**block, keys[0]: _replaced(inner, keys[1:], value)}


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown setting {key!r} (value {first['input']!r})"
    if first["type"] == "missing":
        return f"setting {key!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message[:1].lower()}{message[1:]}, got {first['input']!r}"
