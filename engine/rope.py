"""Rotary position embedding tables: default, linear, llama3 and YaRN scaling, the same numbers as transformers'.

Dynamic and LongRoPE are refused: their angles depend on the total length, so cached keys would go stale as it grows.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import UnsupportedModelError

RopeValue = float | int | str | bool

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_MAY_BE_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""Zero counts as absent, as it does in transformers."""


class RotaryEmbedding:
    """Angles of one model. Keys are cached after rotation, so the tables depend on the position alone."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        inverse_frequencies, self._scale = rope_frequencies(config)
        self._full_width = device.type == "cpu"
        if self._full_width:
            inverse_frequencies = torch.cat((inverse_frequencies, inverse_frequencies))
        self._inverse_frequencies = inverse_frequencies.to(device)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for positions int64 [T]: float32 [T, D/2], or [T, D] with equal halves on a CPU."""
        angles = torch.outer(positions.float(), self._inverse_frequencies)
        cos, sin = angles.cos(), angles.sin_()
        return (cos, sin) if self._scale == 1.0 else (cos.mul_(self._scale), sin.mul_(self._scale))


def check_rope_scaling(parameters: Mapping[str, object]) -> tuple[tuple[str, RopeValue], ...]:
    """A checkpoint's scaling parameters, checked and in a fixed order, as ModelConfig.rope_scaling holds them.

    parameters: `rope_type` and its keys; None values count as absent. Raises UnsupportedModelError for a type that is
    not implemented, a partial rotation, or a missing or malformed value, and names it.
    """
    kept: dict[str, RopeValue] = {}
    for name, value in sorted(parameters.items()):
        if value is None:
            continue
        if not isinstance(value, float | int | str):
            raise UnsupportedModelError(f"rope_scaling.{name} {value!r} is not supported: expected one number or name")
        kept[name] = value
    kind = str(kept.get("rope_type", "default"))
    if kind not in _REQUIRED:
        raise UnsupportedModelError(
            f"rope_scaling.rope_type {kind!r} is not supported: only {', '.join(_REQUIRED)} are"
        )
    if kept.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported: only whole heads rotate"
        )
    for name in _REQUIRED[kind]:
        if name not in kept:
            raise UnsupportedModelError(f"rope_scaling of type {kind} lacks {name!r}")
    for name, value in kept.items():
        if name in _MAY_BE_ZERO and value == 0:
            continue
        if name not in ("rope_type", "truncate") and (isinstance(value, str | bool) or not 0 < value < math.inf):
            raise UnsupportedModelError(f"rope_scaling.{name} must be a positive number, got {value!r}")
    return () if kind == "default" else tuple(kept.items())


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position of each channel pair, float32 [head_dim / 2], and the factor on cos and sin."""
    scaling = dict(config.rope_scaling)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_frequency_factors:
        return frequencies / torch.tensor(config.rope_frequency_factors, dtype=torch.float32), 1.0
    match scaling.get("rope_type", "default"):
        case "linear":
            return frequencies / _number(scaling, "factor"), 1.0
        case "llama3":
            return _llama3(frequencies, scaling), 1.0
        case "yarn":
            return _yarn(config, exponents, scaling)
        case _:
            return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: Mapping[str, RopeValue]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    factor, trained = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    wavelengths = 2 * math.pi / frequencies
    smooth = (trained / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > trained / low, frequencies / factor, blended)
    return torch.where(wavelengths < trained / high, frequencies, scaled)


def _yarn(config: ModelConfig, exponents: Tensor, scaling: Mapping[str, RopeValue]) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): frequencies blended by rotations within the trained length; cos and sin scaled."""
    factor, trained = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")

    def dimension(rotations: float) -> float:
        return config.head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)  # type: ignore[arg-type]
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp_(0, 1)
    periods = config.rope_theta**exponents
    frequencies = (1 - kept) / (factor * periods) + kept / periods
    return frequencies, _yarn_attention_factor(factor, scaling)


def _yarn_attention_factor(factor: float, scaling: Mapping[str, RopeValue]) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in scaling:
        return _number(scaling, "attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(_number(scaling, "mscale")) / mscale(_number(scaling, "mscale_all_dim"))
    return mscale(1.0)


def _number(scaling: Mapping[str, RopeValue], name: str) -> float:
    return float(scaling[name])
