"""Where a checkpoint lies, what it says about itself (config.json), and a fingerprint of its contents."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .config import ModelConfig
from .errors import SettingsError, UnsupportedModelError
from .rope import check_rope_scaling

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

_DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_UNSUPPORTED_FIELDS = (
    "quantization_config",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "no_rope_layers",
    "attention_sinks",
)


def cache_folder() -> Path:
    """Where LServe keeps what it can compute again: $XDG_CACHE_HOME/lserve, ~/.cache/lserve by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lserve"


def locate(path_or_id: str) -> Path:
    """The GGUF file or directory of a checkpoint; a Hugging Face id is downloaded, without code and pickles.

    Raises SettingsError when there is no such file, directory or repository.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or path_or_id.endswith(".gguf") or path_or_id.count("/") != 1:
        raise SettingsError(f"model: no file or directory {path_or_id!r}, and it is not a Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=_DOWNLOADED))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SettingsError(f"model: {path_or_id!r} is no file or directory; as a download: {reason}") from error


def is_gguf(path: Path) -> bool:
    """Whether path is a GGUF file; a directory is not. Raises UnsupportedModelError for any other file."""
    if path.is_dir():
        return False
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UnsupportedModelError(f"{path} is not a GGUF file: a model is one, or a directory of safetensors")
    return True


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in the order of their names.

    Raises UnsupportedModelError when there are none, saying so where pickled weights lie instead.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UnsupportedModelError(f"{index} must have a weight_map from tensor to file names")
        return [directory / name for name in sorted(set(shards.values()))]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in directory.glob(pattern))
    if pickled:
        raise UnsupportedModelError(
            f"{directory} has pickled weights ({pickled[0]}): only safetensors and GGUF are read"
        )
    raise UnsupportedModelError(f"{directory} has no *.safetensors files")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises UnsupportedModelError when it is missing or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UnsupportedModelError(f"{path} is missing") from error
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path} must hold a JSON object")
    return value


def directory_config(directory: Path) -> ModelConfig:
    """ModelConfig of a directory with config.json (and generation_config.json for the end tokens)."""
    raw = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.exists() else None
    return parse_config(raw, ends if ends is not None else raw.get("eos_token_id"))


def parse_config(raw: Mapping[str, object], eos_token_id: object = None) -> ModelConfig:
    """config.json's object to a ModelConfig. Raises UnsupportedModelError naming the field that the model lacks."""
    architecture = _architecture(raw)
    for name in _UNSUPPORTED_FIELDS:
        if raw.get(name):
            raise UnsupportedModelError(f"{name} {_short(raw[name])} is not supported")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {_short(raw['hidden_act'])} is not supported: only silu is")
    num_heads, hidden_size = _integer(raw, "num_attention_heads"), _integer(raw, "hidden_size")
    num_kv_heads = num_heads if raw.get("num_key_value_heads") is None else _integer(raw, "num_key_value_heads")
    head_dim = 128 if architecture == "qwen3" else hidden_size // num_heads
    head_dim = head_dim if raw.get("head_dim") is None else _integer(raw, "head_dim")
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise UnsupportedModelError(f"head_dim {head_dim} is odd")
    num_layers, max_position = _integer(raw, "num_hidden_layers"), _integer(raw, "max_position_embeddings")
    _refuse_sliding_window(raw, architecture, num_layers, max_position)
    rope = _rope_parameters(raw, max_position)
    has_bias = bool(raw.get("attention_bias", False)) and architecture in ("llama", "qwen3")
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_integer(raw, "vocab_size"),
        max_position=max_position,
        rope_theta=_positive(rope.pop("rope_theta", 10000.0), "rope_theta"),
        rms_norm_eps=_positive(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_scaling=check_rope_scaling(rope),
        attention_bias=has_bias or architecture == "qwen2",
        attention_output_bias=has_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and architecture == "llama",
        qk_norm=architecture == "qwen3",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=token_ids(eos_token_id),
    )


def token_ids(value: object) -> tuple[int, ...]:
    """An `eos_token_id` field: absent, one id or a list."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise UnsupportedModelError(f"eos_token_id must be token ids, got {_short(value)}")
    return tuple(ids)


def fingerprint(path_or_id: str) -> str:
    """SHA-256 (hex) over the contents of a checkpoint's config and weights: equal wherever the same files lie, and
    whichever version of transformers saved them.

    Large files are hashed once: the result is kept under `cache_folder()` by path, size and modification time.
    """
    path = locate(path_or_id)
    if is_gguf(path):
        return file_digest(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(path):
        total.update(f"{file.name}:{file_digest(file)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file; kept under `cache_folder()` by path, size and modification time."""
    real, status = path.resolve(), path.stat()
    key = hashlib.sha256(f"{real}:{status.st_size}:{status.st_mtime_ns}".encode()).hexdigest()
    kept = cache_folder() / "digests" / key
    with contextlib.suppress(OSError):
        return kept.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a read-only home costs a second hash, nothing more
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as written:
            written.write(digest)
        os.replace(written.name, kept)
    return digest


def _architecture(raw: Mapping[str, object]) -> str:
    names, kind = raw.get("architectures"), raw.get("model_type")
    if isinstance(names, list) and names:
        if isinstance(names[0], str) and names[0] in ARCHITECTURES:
            return ARCHITECTURES[names[0]]
        raise UnsupportedModelError(
            f"architectures {_short(names[0])} is not supported: only {', '.join(ARCHITECTURES)} are"
        )
    if isinstance(kind, str) and kind in ARCHITECTURES.values():
        return kind
    raise UnsupportedModelError(
        f"model_type {_short(kind)} is not supported: only {', '.join(ARCHITECTURES.values())} are"
    )


def _refuse_sliding_window(raw: Mapping[str, object], architecture: str, num_layers: int, max_position: int) -> None:
    """A window that never bites, since no position is that far, is fine."""
    window: object = None
    match architecture:
        case "mistral":
            window = raw.get("sliding_window", 4096)
        case "qwen2" | "qwen3" if raw.get("use_sliding_window"):
            layers = raw.get("layer_types")
            first = raw.get("max_window_layers", 28)
            num_full = first if isinstance(first, int) else 0
            slides = "sliding_attention" in layers if isinstance(layers, list) else num_full < num_layers
            window = raw.get("sliding_window", 4096) if slides else None
    if window is not None and (not isinstance(window, int) or window < max_position):
        raise UnsupportedModelError(
            f"sliding_window {_short(window)} is not supported: max_position_embeddings is {max_position}"
        )


def _rope_parameters(raw: Mapping[str, object], max_position: int) -> dict[str, object]:
    """One dict from `rope_parameters` (new files) or `rope_scaling` and `rope_theta` (older ones)."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UnsupportedModelError(f"rope_scaling must be an object, got {_short(given)}")
    rope = dict(given)
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None and raw.get(name) is not None:
            rope[name] = raw[name]
    if rope["rope_type"] in ("llama3", "yarn"):
        trained = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = trained or max_position
    return rope


def _integer(raw: Mapping[str, object], name: str) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(f"{name} must be a positive whole number, got {_short(value)}")
    return value


def _positive(value: object, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"{name} must be a positive number, got {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
