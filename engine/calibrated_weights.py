"""Low-bit layers that are calibrated once per model, format and device type, and kept on disk for every later start.

Workers must compute with the same weights. The first one calibrates while others wait, and all of them read what it
wrote; `digest` tells results apart where they were made twice, on machines that share no cache folder.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lserve.kernels.weight_format import W4Weight, W8Weight

from .calibration import Calibration
from .checkpoint import cache_folder, file_digest, read_json
from .config import ModelConfig
from .errors import SettingsError, UnsupportedModelError
from .model import Layer
from .quantization import Linear, NativeLinear, QuantizedLinear, WeightFormat, quantized_linear
from .tokenizer import Tokenizer

VERSION = 1
"""Of the method; another one makes other weights."""

PASSAGE = 1024
"""Tokens of the text that attend to each other."""

MIN_PASSAGES = 12
"""A narrow model reads this many; wider ones as many tokens as twice their widest input, as far as the text goes."""

PROGRESS_S = 10.0

logger = logging.getLogger(__name__)


class CalibratedWeights:
    """A `weights.LowBit`: makes layers, or reads those made before.

    Raises SettingsError when the cache folder cannot be written.
    """

    def __init__(
        self, weight_format: WeightFormat, fingerprint: str, text: Sequence[int], prefix: Sequence[int]
    ) -> None:
        """fingerprint: of the checkpoint. text: token ids to calibrate with; every passage of them follows prefix."""
        self._format, self._fingerprint, self._text, self._prefix = weight_format, fingerprint, text, prefix
        self.digest = ""
        """Hash of the layers that were made or read."""

    @classmethod
    def from_tokenizer(cls, weight_format: WeightFormat, fingerprint: str, tokenizer: Tokenizer) -> "CalibratedWeights":
        """With the text that comes with this package: prose, code, tables and dialogue.

        Excerpts of the Jargon File 4.4.7 (public domain), of LServe's own code and documentation, and lines written
        for it.
        """
        text = Path(__file__).with_name("calibration.txt").read_text(encoding="utf-8")
        prefix = tokenizer.encode("")
        return cls(weight_format, fingerprint, tokenizer.encode(text, add_special_tokens=False), prefix)

    def __call__(self, config: ModelConfig, embedding: Tensor, layers: Iterator[Layer]) -> tuple[Layer, ...]:
        """Low-bit layers on embedding's device. layers are only asked for when nothing is kept yet."""
        folder = self._folder(embedding)
        kept = self._read(folder, config, embedding)
        if kept is None:
            with _locked(folder):
                kept = self._read(folder, config, embedding)
                if kept is None:
                    self._calibrate(folder, config, embedding, layers)
                    kept = self._read(folder, config, embedding)
        if kept is None:
            raise SettingsError(f"calibrated weights were written to {folder} and cannot be read back")
        return kept

    def _folder(self, embedding: Tensor) -> Path:
        identity = [VERSION, self._fingerprint, self._format, str(embedding.dtype), embedding.device.type]
        key = json.dumps([*identity, list(self._text), list(self._prefix)])
        return cache_folder() / "calibrated" / f"{self._format}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"

    def _calibrate(self, folder: Path, config: ModelConfig, embedding: Tensor, layers: Iterator[Layer]) -> None:
        """Writes one file per layer and a list of their hashes; the folder appears whole or not at all."""
        calibration = Calibration(config, self._passages(config).to(embedding.device), embedding, self._format)
        start = reported = time.monotonic()
        logger.info("calibrating %s weights, once; they are kept in %s", self._format, folder)
        try:
            scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            try:
                with torch.inference_mode():
                    for index, layer in enumerate(calibration.quantize(layers)):
                        save_file(_tensors(layer), scratch / _file_name(index))
                        now = time.monotonic()
                        if now - reported > PROGRESS_S or index + 1 == config.num_layers:
                            reported, left = now, (now - start) / (index + 1) * (config.num_layers - index - 1)
                            logger.info("calibrated layer %d of %d, %.0f s left", index + 1, config.num_layers, left)
                names = [_file_name(index) for index in range(config.num_layers)]
                digests = {name: file_digest(scratch / name) for name in names}
                (scratch / "digests.json").write_text(json.dumps(digests))
                scratch.chmod(0o755)
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def _passages(self, config: ModelConfig) -> Tensor:
        """int64 [passages, length], evenly spread over the text."""
        length = min(PASSAGE, config.max_position) - len(self._prefix)
        length = min(length, len(self._text))
        available = len(self._text) // length
        wanted = max(MIN_PASSAGES, -(-2 * config.intermediate_size // PASSAGE))
        starts = torch.linspace(0, available - 1, min(available, wanted)).round().long() * length
        rows = torch.tensor(self._text)[starts[:, None] + torch.arange(length)]
        prefix = torch.tensor(list(self._prefix), dtype=torch.int64).expand(len(rows), -1)
        return torch.cat((prefix, rows), dim=1)

    def _read(self, folder: Path, config: ModelConfig, embedding: Tensor) -> tuple[Layer, ...] | None:
        """The kept layers; None when there are none, or they are damaged."""
        if not folder.is_dir():
            return None
        try:
            digests = read_json(folder / "digests.json")
            layers = []
            for index in range(config.num_layers):
                file = folder / _file_name(index)
                if file_digest(file) != digests[file.name]:
                    raise ValueError(f"{file.name} has changed")
                layers.append(_layer(load_file(file, device=str(embedding.device)), config, embedding.dtype))
        except (OSError, KeyError, ValueError, SafetensorError, UnsupportedModelError) as error:
            logger.warning("calibrated weights in %s are damaged (%s): making them again", folder, error)
            return None
        self.digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        return tuple(layers)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with a process that dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.info("waiting for another process that calibrates the same weights")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unwritable(folder: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"calibrated weights cannot be kept in {folder}: {error.strerror or error}; "
        "XDG_CACHE_HOME names another place, calibrate: false does without them"
    )


def _file_name(index: int) -> str:
    return f"layer-{index:03d}.safetensors"


def _tensors(layer: Layer) -> dict[str, Tensor]:
    """A layer's tensors by name."""
    norms = {
        "input_norm": layer.input_norm,
        "query_norm": layer.query_norm,
        "key_norm": layer.key_norm,
        "post_norm": layer.post_norm,
    }
    found = dict(norms)
    for name, linear in (
        ("qkv", layer.qkv),
        ("output", layer.output),
        ("gate_up", layer.gate_up),
        ("down", layer.down),
    ):
        assert isinstance(linear, NativeLinear | QuantizedLinear)
        found[f"{name}.bias"] = linear.bias
        if isinstance(linear, NativeLinear):
            found[f"{name}.weight"] = linear.weight
        else:
            found |= {f"{name}.codes": linear.weight.codes, f"{name}.scale": linear.weight.scale}
            if isinstance(linear.weight, W4Weight):
                found[f"{name}.levels"] = linear.weight.levels
    return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}


def _layer(tensors: dict[str, Tensor], config: ModelConfig, compute_dtype: torch.dtype) -> Layer:
    """The layer that these tensors were of. Raises KeyError when one is missing."""

    def linear(name: str, in_features: int) -> Linear:
        bias = tensors.get(f"{name}.bias")
        if f"{name}.weight" in tensors:
            return NativeLinear(tensors[f"{name}.weight"], bias)
        codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
        if f"{name}.levels" in tensors:
            weight = W4Weight(codes, tensors[f"{name}.levels"], scale, in_features)
            return quantized_linear(weight, bias, compute_dtype)
        return quantized_linear(W8Weight(codes, scale), bias, compute_dtype)

    return Layer(
        input_norm=tensors["input_norm"],
        qkv=linear("qkv", config.hidden_size),
        query_norm=tensors.get("query_norm"),
        key_norm=tensors.get("key_norm"),
        output=linear("output", config.num_heads * config.head_dim),
        post_norm=tensors["post_norm"],
        gate_up=linear("gate_up", config.hidden_size),
        down=linear("down", config.intermediate_size),
    )
