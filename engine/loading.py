"""From settings to a loaded model: weights, tokenizer, head profile and the page format that follows from them."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .checkpoint import fingerprint
from .config import EngineConfig, SparsityConfig
from .head_profile import HeadProfile
from .model import Model
from .page_format import PageFormat, make_page_format
from .tokenizer import Tokenizer
from .weights import load_model


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What an engine is built over. sparsity is the settings' with the head profile's sink and window put in."""

    model: Model
    tokenizer: Tokenizer
    page_format: PageFormat
    sparsity: SparsityConfig


def load(config: EngineConfig, weights: LoadedModel | None = None) -> LoadedModel:
    """Loads everything that `config` names. Raises UnsupportedModelError, FormatMismatchError or SettingsError.

    weights: the same model, device, dtype and weight format, loaded before, to share its weights and tokenizer.
    """
    dtype_name = config.compute_dtype or ("float32" if config.device == "cpu" else "bfloat16")
    dtype = getattr(torch, dtype_name)
    model = load_model(config.model, config.device, dtype, config.weights) if weights is None else weights.model
    identity = fingerprint(config.model)
    sparsity = config.sparsity
    if sparsity.head_profile is None:
        profile = HeadProfile.none(model.config.num_layers, model.config.num_kv_heads)
    else:
        profile = HeadProfile.load(Path(sparsity.head_profile))
        profile.check(identity, model.config.num_layers, model.config.num_kv_heads)
        sparsity = replace(sparsity, sink_size=profile.sink_size, local_window=profile.local_window)
    page_format = make_page_format(
        model.config, config.cache, sparsity, profile.streaming, identity, config.weights, dtype_name
    )
    tokenizer = Tokenizer.from_pretrained(config.model) if weights is None else weights.tokenizer
    return LoadedModel(model, tokenizer, page_format, sparsity)
