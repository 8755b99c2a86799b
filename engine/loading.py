"""From settings to a loaded model: weights, tokenizer, head profile and the page format that follows from them."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .calibrated_weights import CalibratedWeights
from .checkpoint import fingerprint
from .config import EngineConfig, SparsityConfig
from .head_profile import HeadProfile
from .model import Model
from .page_format import PageFormat, make_page_format
from .tokenizer import Tokenizer
from .weights import load_model


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What an engine is built over. sparsity is the settings' with the head profile's sink and window put in.

    weights_id: the weight format, and for calibrated weights a hash of them.
    """

    model: Model
    tokenizer: Tokenizer
    page_format: PageFormat
    sparsity: SparsityConfig
    weights_id: str = "native"


def load(config: EngineConfig, weights: LoadedModel | None = None) -> LoadedModel:
    """Loads everything that `config` names. Raises UnsupportedModelError, FormatMismatchError or SettingsError.

    weights: the same model, device, dtype and weight format, loaded before, to share its weights and tokenizer.
    """
    dtype_name = config.compute_dtype or ("float32" if config.device == "cpu" else "bfloat16")
    if weights is None:
        tokenizer = Tokenizer.from_pretrained(config.model)
        model, weights_id = _load_weights(config, getattr(torch, dtype_name), tokenizer)
    else:
        tokenizer, model, weights_id = weights.tokenizer, weights.model, weights.weights_id
    identity = fingerprint(config.model)
    sparsity = config.sparsity
    if sparsity.head_profile is None:
        profile = HeadProfile.none(model.config.num_layers, model.config.num_kv_heads)
    else:
        profile = HeadProfile.load(Path(sparsity.head_profile))
        profile.check(identity, model.config.num_layers, model.config.num_kv_heads)
        sparsity = replace(sparsity, sink_size=profile.sink_size, local_window=profile.local_window)
    page_format = make_page_format(
        model.config, config.cache, sparsity, profile.streaming, identity, weights_id, dtype_name
    )
    return LoadedModel(model, tokenizer, page_format, sparsity, weights_id)


def _load_weights(config: EngineConfig, dtype: torch.dtype, tokenizer: Tokenizer) -> tuple[Model, str]:
    """The model, and what of its weights beside the checkpoint's fingerprint changes a page's numbers."""
    if config.weights == "native" or not config.calibrate:
        return load_model(config.model, config.device, dtype, config.weights), config.weights
    calibrated = CalibratedWeights.from_tokenizer(config.weights, fingerprint(config.model), tokenizer)
    model = load_model(config.model, config.device, dtype, low_bit=calibrated)
    return model, f"{config.weights} {calibrated.digest}"
