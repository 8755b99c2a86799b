"""Settings for one machine: what the user gave, and for the rest what suits the CPUs and GPUs that are here."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lserve.deployments.settings import Settings, load_settings
from lserve.engine.checkpoint import locate
from lserve.engine.weights import read_config

from .demo_model import SERVED_NAME, demo_model

DEMO_PROFILE = Path(__file__).parent / "demo_heads.json"
"""The demo model's head profile; its evidence says how the heads were scored and chosen."""

# Low-bit pages, selection from 1,024 tokens on, and a handoff even for short prompts: the whole path, on two cores. A
# chunk takes half a second there: a step in progress is not broken off when its client leaves.
DEMO: dict[str, Any] = {
    "cache": {"kv_dtype": "int4", "retrieval_pool_bytes": 512 << 20},  # nine requests of full length
    # Pages are chosen for every token, with all of them as candidates: choices that are reused, and cheaper ones, cost
    # a model this small answers.
    "sparsity": {"token_budget": 1024, "reselect_interval": 1, "candidate_factor": 8},
    "prefill": {"replicas": 1, "local_threshold": 0, "chunk_size": 256},
    "decode": {"replicas": 1},
}


def local_settings(
    file: str | None, model: str | None, overrides: Sequence[str], report: Callable[[str], None] = lambda stage: None
) -> Settings:
    """Reads the settings and finds the model, which is fetched first where need be; report is told what is being done.

    file: YAML file. model: goes before the file's. With neither, the demo model is served. Raises LServeError.
    """
    if file is None and model is None and not any(o.startswith("model.path=") for o in overrides):
        block = {**DEMO, "model": {"path": str(demo_model(report)), "served_name": SERVED_NAME}}
        block["sparsity"] = {**DEMO["sparsity"], "head_profile": str(DEMO_PROFILE)}
        settings = load_settings(block, overrides)
    else:
        chosen = [] if model is None else [f"model.path={model}"]
        settings = load_settings(file, [*chosen, *overrides])
    if not Path(settings.model.path).exists():
        report(f"fetching {settings.model.path}")
    path = str(locate(settings.model.path).resolve())
    read_config(path)  # an unsupported model is refused here, before anything is started
    settings = _updated(settings, "model", {"path": path, "served_name": settings.served_name})
    return _with_shares(settings)


def _with_shares(settings: Settings) -> Settings:
    """Divides GPUs, or else cores, between the workers, where the settings do not say.

    With one GPU a single worker both prefills and decodes, since two would halve its memory. On CPUs every worker may
    use every core: at most times only one of them is busy.
    """
    import torch

    prefill, decode = settings.prefill, settings.decode
    if "num_gpus" in prefill.model_fields_set | decode.model_fields_set:
        return settings
    num_gpus = torch.cuda.device_count()
    if num_gpus:
        replicas = prefill.replicas if num_gpus >= prefill.replicas + decode.replicas else 0
        settings = _updated(settings, "prefill", {"num_gpus": 1.0, "replicas": replicas})
        return _updated(settings, "decode", {"num_gpus": 1.0})
    if "num_cpus" in prefill.model_fields_set | decode.model_fields_set:
        return settings
    cores = {"num_cpus": float(len(os.sched_getaffinity(0)))}
    return _updated(_updated(settings, "prefill", cores), "decode", cores)


def _updated(settings: Settings, section: str, values: Mapping[str, Any]) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})
