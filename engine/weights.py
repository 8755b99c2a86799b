"""Checkpoints to models, matrix by matrix: read, check, fuse, rotate values, convert. No second copy of all is held."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import directory_config, fingerprint, is_gguf, locate, weight_files
from .config import ModelConfig
from .errors import UnsupportedModelError
from .gguf import GGUFTensors, gguf_config, open_gguf
from .model import Layer, Model, Weights
from .quantization import Linear, NativeLinear, WeightFormat, make_linear

__all__ = ["fingerprint", "load_model", "read_config", "value_rotation"]


LowBit = Callable[[ModelConfig, Tensor, Iterator[Layer]], Iterable[Layer]]
"""(configuration, embedding, layers with native float32 weights, made as they are asked for) to low-bit layers."""


class TensorSource(Protocol):
    """A checkpoint's tensors under transformers' names, with half-split query and key channels."""

    def names(self) -> Iterable[str]:
        """All tensors there are."""

    def read(self, name: str) -> Tensor:
        """One tensor, in a float dtype, on the CPU. Raises UnsupportedModelError when the file lacks it."""


class SafetensorsFiles:
    """Tensors of one or more safetensors files, read on demand from memory-mapped files."""

    def __init__(self, files: list[Path]) -> None:
        self._handles: dict[str, safe_open] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise UnsupportedModelError(f"{file} cannot be read: {error}") from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))  # type: ignore[no-untyped-call]

    def names(self) -> Iterable[str]:
        """All tensors there are."""
        return self._handles

    def read(self, name: str) -> Tensor:
        """One tensor as stored."""
        if name not in self._handles:
            raise UnsupportedModelError(f"the checkpoint lacks tensor {name!r}")
        tensor: Tensor = self._handles[name].get_tensor(name)  # type: ignore[no-untyped-call]
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UnsupportedModelError(f"tensor {name!r} has dtype {tensor.dtype}: only floats are read")
        return tensor


def read_config(path_or_id: str) -> ModelConfig:
    """ModelConfig of a local directory, Hugging Face id or GGUF file. Raises UnsupportedModelError, SettingsError."""
    path = locate(path_or_id)
    return gguf_config(open_gguf(path)) if is_gguf(path) else directory_config(path)


def load_model(
    path_or_id: str,
    device: str | torch.device,
    compute_dtype: torch.dtype,
    weight_format: WeightFormat = "native",
    low_bit: LowBit | None = None,
) -> Model:
    """Loads a checkpoint onto a device, with floats in compute_dtype and linear layers in weight_format.

    low_bit makes the layers instead of weight_format, which rounds every matrix by itself.

    Raises UnsupportedModelError, naming the field or tensor, for a checkpoint that does not fit; SettingsError for a
    path or id that does not exist.
    """
    path = locate(path_or_id)
    source: TensorSource
    if is_gguf(path):
        reader = open_gguf(path)
        config = gguf_config(reader)
        source = GGUFTensors(reader, config)
    else:
        config = directory_config(path)
        source = SafetensorsFiles(weight_files(path))
    return build_model(config, source, torch.device(device), compute_dtype, weight_format, low_bit)


def build_model(
    config: ModelConfig,
    source: TensorSource,
    device: torch.device,
    compute_dtype: torch.dtype,
    weight_format: WeightFormat = "native",
    low_bit: LowBit | None = None,
) -> Model:
    """A model from any source of tensors; arguments and errors as in load_model.

    Every tensor must be there, with the shape that config says, and none may be left over; layers that low_bit does not
    ask for are not checked.
    """
    reader = _Reader(config, source, device, compute_dtype, weight_format if low_bit is None else "native")
    if low_bit is not None:
        reader.linear_dtype = torch.float32
    embedding = reader.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size, dtype=compute_dtype)
    final_norm = reader.tensor("model.norm.weight", config.hidden_size, dtype=compute_dtype)
    head: Linear = NativeLinear(embedding, None)
    if not config.tie_embeddings:
        head = NativeLinear(
            reader.tensor("lm_head.weight", config.vocab_size, config.hidden_size, dtype=compute_dtype), None
        )
    layers: Iterable[Layer] = _layers(reader)
    if low_bit is not None:
        layers = low_bit(config, embedding, _layers(reader))
    return Model(config, Weights(embedding, tuple(layers), final_norm, head))


def value_rotation(head_dim: int) -> Tensor:
    """The orthonormal, symmetric float32 [head_dim, head_dim] matrix that cached values are multiplied by.

    Block-diagonal Hadamard matrices of the largest power of two that divides head_dim. It spreads an outlier channel
    over its block, which makes per-token low-bit codes finer; the output projection undoes it.
    """
    size = head_dim & -head_dim
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    return torch.kron(torch.eye(head_dim // size), block * size**-0.5)


class _Reader:
    """Reads, checks and counts the tensors of one checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        device: torch.device,
        compute_dtype: torch.dtype,
        weight_format: WeightFormat,
    ) -> None:
        self.config, self.compute_dtype, self.linear_dtype = config, compute_dtype, compute_dtype
        self.rotation = value_rotation(config.head_dim).to(device)
        self._source, self._device, self._format = source, device, weight_format
        self._unread = set(source.names())

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the target device, in the checkpoint's dtype or the one given."""
        tensor = self._source.read(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, the configuration says {shape}"
            )
        self._unread.discard(name)
        # a copy even on the CPU: weights must not change with the mapped file
        return tensor.to(self._device, dtype or tensor.dtype, copy=True)

    def rows(self, name: str, num_rows: int, num_columns: int, *, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Weight [num_rows, num_columns] and bias [num_rows] of one projection."""
        return self.tensor(f"{name}.weight", num_rows, num_columns), (
            self.tensor(f"{name}.bias", num_rows) if bias else None
        )

    def linear(self, *parts: tuple[Tensor, Tensor | None]) -> Linear:
        """Projections stacked into one."""
        weights, biases = zip(*parts, strict=True)
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = torch.cat(biases) if biases[0] is not None else None
        return make_linear(weight, bias, self._format, self.linear_dtype)

    def check_all_read(self) -> None:
        """A tensor that nothing read is a feature that the model code lacks."""
        left = sorted(n for n in self._unread if not n.endswith("rotary_emb.inv_freq"))
        if self.config.tie_embeddings:
            left = [n for n in left if n != "lm_head.weight"]
        if left:
            raise UnsupportedModelError(
                f"tensor {left[0]!r} has no place in a {self.config.architecture} model ({len(left)} such tensors)"
            )


def _layers(reader: _Reader) -> Iterator[Layer]:
    """Reads all layers in order, then checks that nothing of the checkpoint is left."""
    for index in range(reader.config.num_layers):
        yield _layer(reader, index)
    reader.check_all_read()


def _layer(reader: _Reader, index: int) -> Layer:
    config, dtype = reader.config, reader.compute_dtype
    name, hidden = f"model.layers.{index}", config.hidden_size
    query_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def norm(suffix: str, width: int) -> Tensor:
        return reader.tensor(f"{name}.{suffix}.weight", width, dtype=dtype)

    def projection(suffix: str, num_rows: int, columns: int, bias: bool) -> tuple[Tensor, Tensor | None]:
        return reader.rows(f"{name}.{suffix}", num_rows, columns, bias=bias)

    return Layer(
        input_norm=norm("input_layernorm", hidden),
        qkv=reader.linear(
            projection("self_attn.q_proj", query_rows, hidden, config.attention_bias),
            projection("self_attn.k_proj", kv_rows, hidden, config.attention_bias),
            _rotate_values(reader, projection("self_attn.v_proj", kv_rows, hidden, config.attention_bias)),
        ),
        query_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
        key_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
        output=reader.linear(
            _unrotate_values(reader, projection("self_attn.o_proj", hidden, query_rows, config.attention_output_bias))
        ),
        post_norm=norm("post_attention_layernorm", hidden),
        gate_up=reader.linear(
            projection("mlp.gate_proj", config.intermediate_size, hidden, config.mlp_bias),
            projection("mlp.up_proj", config.intermediate_size, hidden, config.mlp_bias),
        ),
        down=reader.linear(projection("mlp.down_proj", hidden, config.intermediate_size, config.mlp_bias)),
    )


def _rotate_values(reader: _Reader, part: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """v_proj's rows, head by head, so that values come out rotated; float32."""
    weight, bias = part
    rotated = (reader.rotation @ weight.float().view(-1, reader.config.head_dim, weight.shape[1])).view(weight.shape)
    if bias is not None:
        bias = (bias.float().view(-1, reader.config.head_dim) @ reader.rotation).view(-1)
    return rotated, bias


def _unrotate_values(reader: _Reader, part: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """o_proj's columns, head by head, so that it takes rotated values; float32."""
    weight, bias = part
    heads = weight.float().view(weight.shape[0], -1, reader.config.head_dim)
    return (heads @ reader.rotation).view(weight.shape), bias
