"""GGUF files: configuration and tensors, under transformers' names and in its channel order."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from .config import ModelConfig
from .errors import UnsupportedModelError
from .rope import check_rope_scaling

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""`general.architecture` of the files that are read; Mistral's say llama."""

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: Path) -> GGUFReader:
    """Maps a GGUF file and reads its metadata. Raises UnsupportedModelError when it is damaged."""
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UnsupportedModelError(f"{path} is not a readable GGUF file: {error}") from error


def gguf_config(reader: GGUFReader) -> ModelConfig:
    """ModelConfig of a GGUF file. Raises UnsupportedModelError naming the key that the model code lacks."""
    tensors = {t.name: t for t in reader.tensors}
    fields = _Fields(reader)
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"general.architecture {architecture!r} is not supported: only {', '.join(ARCHITECTURES)} are"
        )
    _refuse(fields)
    num_heads, hidden_size = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := fields.integer(key, head_dim)) != head_dim:
            raise UnsupportedModelError(f"{fields.name(key)} {width} is not supported: head_dim is {head_dim}")
    num_kv_heads = fields.integer("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise UnsupportedModelError(
            f"{num_heads} heads of {head_dim} channels over {num_kv_heads} KV heads are not supported"
        )
    if "token_embd.weight" not in tensors:
        raise UnsupportedModelError("the checkpoint lacks tensor 'token_embd.weight'")
    factors = tensors.get(_ROPE_FACTORS)
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.integer("block_count"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        max_position=fields.integer("context_length"),
        rope_theta=fields.number("rope.freq_base", 10000.0),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_scaling=_rope_scaling(fields),
        rope_frequency_factors=() if factors is None else tuple(_floats(factors).flatten().tolist()),
        attention_bias="blk.0.attn_q.bias" in tensors,
        attention_output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
        eos_token_ids=end_token_ids(reader),
    )


def end_token_ids(reader: GGUFReader) -> tuple[int, ...]:
    """Tokens that end an answer: of the sequence, the turn and the message, where the file names them."""
    fields = _Fields(reader)
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(fields.integer(key) for key in keys if fields.has(key)))


class GGUFTensors:
    """A GGUF file's tensors, dequantized one at a time on the CPU."""

    def __init__(self, reader: GGUFReader, config: ModelConfig) -> None:
        self._config = config
        self._tensors: dict[str, ReaderTensor] = {}
        for tensor in reader.tensors:
            if tensor.name != _ROPE_FACTORS:
                self._tensors[_transformers_name(tensor.name)] = tensor

    def names(self) -> Iterable[str]:
        """All tensors there are, but for the rotary factors, which are part of the configuration."""
        return self._tensors

    def read(self, name: str) -> Tensor:
        """One tensor: float32, or as stored where that is a 16-bit float. Raises UnsupportedModelError without it."""
        if name not in self._tensors:
            raise UnsupportedModelError(f"the checkpoint lacks tensor {name!r}")
        tensor = _floats(self._tensors[name])
        if self._config.architecture == "llama":
            if ".q_proj." in name:
                return _half_split(tensor, self._config.num_heads)
            if ".k_proj." in name:
                return _half_split(tensor, self._config.num_kv_heads)
        return tensor


class _Fields:
    """Metadata with the architecture's prefix left out."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader

    def name(self, key: str) -> str:
        """The full key: `general.` and `tokenizer.` stay, others belong to the architecture."""
        if key.split(".")[0] in ("general", "tokenizer", "split"):
            return key
        return f"{self.text('general.architecture')}.{key}"

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return self.name(key) in self._reader.fields

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        field = self._reader.fields.get(self.name(key))
        return default if field is None else str(field.contents())

    def number(self, key: str, default: float | None = None) -> float:
        """A number; raises UnsupportedModelError when it is missing and has no default, or is a list."""
        field = self._reader.fields.get(self.name(key))
        value = default if field is None else field.contents()
        if not isinstance(value, int | float):
            raise UnsupportedModelError(f"{self.name(key)} must be one number, got {str(value)[:60]}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive or zero whole number; errors as in number."""
        return int(self.number(key, default))


def _refuse(fields: _Fields) -> None:
    for key in ("expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.scale"):
        if fields.has(key) and fields.number(key):
            raise UnsupportedModelError(f"{fields.name(key)} {fields.number(key)} is not supported")
    if fields.integer("split.count", 1) > 1:
        raise UnsupportedModelError(
            f"split.count {fields.integer('split.count')} is not supported: merge the file first"
        )
    window, context = fields.integer("attention.sliding_window", 0), fields.integer("context_length")
    if 0 < window < context:
        raise UnsupportedModelError(
            f"{fields.name('attention.sliding_window')} {window} is not supported: context_length is {context}"
        )


def _rope_scaling(fields: _Fields) -> tuple[tuple[str, float | int | str | bool], ...]:
    kind = fields.text("rope.scaling.type", "none")
    if kind == "none":
        return ()
    parameters: dict[str, object] = {"rope_type": kind}
    names = {
        "factor": "rope.scaling.factor",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "attention_factor": "rope.scaling.attn_factor",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    for name, key in names.items():
        if fields.has(key):
            parameters[name] = fields.number(key)
    return check_rope_scaling(parameters)


def _transformers_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _TENSOR_NAMES:
        return name
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_TENSOR_NAMES[match[2]]}.{match[3]}"


def _floats(tensor: ReaderTensor) -> Tensor:
    """Dequantized, rows first. bfloat16 and float16 stay as they are."""
    match tensor.tensor_type:
        case GGMLQuantizationType.F32 | GGMLQuantizationType.F16:
            return torch.from_numpy(np.array(tensor.data))
        case GGMLQuantizationType.BF16:
            return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16)
        case _:
            try:
                return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            except NotImplementedError as error:
                kind = tensor.tensor_type.name
                raise UnsupportedModelError(
                    f"tensor {tensor.name!r} has type {kind}, which is not supported"
                ) from error


def _half_split(tensor: Tensor, num_heads: int) -> Tensor:
    """llama.cpp stores Llama's query and key channels in adjacent pairs; rotation here pairs channel i with i + D/2."""
    return tensor.view(num_heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
