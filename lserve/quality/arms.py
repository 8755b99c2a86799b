"""From settings to askers in this process: arms share weights, and pages too where only page selection differs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lserve.engine.config import EngineConfig, SparsityConfig
from lserve.engine.engine import Engine
from lserve.engine.errors import SettingsError
from lserve.engine.loading import LoadedModel, load
from lserve.engine.request import AttentionOptions

from .engine_asker import EngineAsker

GPU_FRACTION = 0.7
"""Of the free memory, for the pages of all engines together where the settings do not say."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One choice of settings. attention: what its requests ask for."""

    name: str
    config: EngineConfig
    attention: AttentionOptions = AttentionOptions()

    @property
    def pages(self) -> EngineConfig:
        """What decides its pages: two arms that agree on it can share an engine."""
        chosen = SparsityConfig()
        same = {
            "rule": chosen.rule,
            "candidate_factor": chosen.candidate_factor,
            "reselect_interval": chosen.reselect_interval,
            "token_budget": chosen.token_budget,
            "max_token_budget": chosen.max_token_budget,
        }
        return replace(self.config, sparsity=replace(self.config.sparsity, **same))  # type: ignore[arg-type]


def open_arms(arms: Sequence[Arm], max_length: int) -> list[EngineAsker]:
    """An asker for each arm, for documents of at most max_length tokens. Raises LServeError."""
    models: dict[EngineConfig, LoadedModel] = {}
    engines: dict[EngineConfig, Engine] = {}
    weights: dict[tuple[object, ...], LoadedModel] = {}
    for arm in arms:
        config = arm.pages
        if config not in models:
            key = (config.model, config.device, config.compute_dtype, config.weights, config.seed)
            models[config] = load(config, weights.get(key))
            weights[key] = models[config]
    for config, loaded in models.items():
        limit = loaded.model.config.max_position
        if max_length > limit:
            raise SettingsError(f"--lengths: the model reads {limit} tokens, got {max_length}")
        sized = replace(config, scheduler=replace(config.scheduler, max_model_len=max_length))
        if config.device.startswith("cuda") and config.cache.retrieval_pool_bytes is None:
            share = int(torch.cuda.mem_get_info()[0] * GPU_FRACTION) // (len(models) - len(engines))
            sized = replace(sized, cache=replace(sized.cache, retrieval_pool_bytes=share))
        engines[config] = Engine(sized, loaded)
    return [EngineAsker(arm.name, engines[arm.pages], arm.attention, arm.config.sparsity) for arm in arms]
