"""Settings for one machine: what the user gave stays, the rest follows from the machine."""

import os
from pathlib import Path

import pytest
import torch

from lserve.cli.local_settings import local_settings


def test_without_a_model_the_demo_model_is_served_with_sparse_attention(demo_directory: Path) -> None:
    settings = local_settings(None, None, ["router.port=8123"])
    assert settings.served_name == "smollm2-135m-instruct"
    assert settings.model.path == str(demo_directory)
    assert (settings.cache.kv_dtype, settings.sparsity.token_budget) == ("int4", 1024)
    assert (settings.prefill.replicas, settings.decode.replicas, settings.router.port) == (1, 1, 8123)


def test_the_flag_goes_before_the_file(demo_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("args: {model: {path: nowhere}, cache: {kv_dtype: int8}}")
    settings = local_settings(str(file), str(demo_directory), ["decode.max_batch_size=3"])
    assert settings.model.path == str(demo_directory)
    assert settings.served_name == demo_directory.name
    assert (settings.cache.kv_dtype, settings.decode.max_batch_size) == ("int8", 3)


def test_cores_are_shared_unless_the_settings_say_otherwise(
    demo_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    settings = local_settings(None, str(demo_directory), [])
    cores = len(os.sched_getaffinity(0))
    assert (settings.prefill.num_cpus, settings.decode.num_cpus) == (cores, cores)
    settings = local_settings(None, str(demo_directory), ["decode.num_cpus=3"])
    assert (settings.prefill.num_cpus, settings.decode.num_cpus) == (1, 3)


@pytest.mark.parametrize(("gpus", "prefill_replicas"), [(1, 0), (2, 1), (8, 1)])
def test_every_worker_gets_a_gpu_and_one_gpu_makes_a_unified_worker(
    gpus: int, prefill_replicas: int, demo_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    settings = local_settings(None, str(demo_directory), [])
    assert (settings.prefill.replicas, settings.prefill.num_gpus, settings.decode.num_gpus) == (prefill_replicas, 1, 1)
    settings = local_settings(None, str(demo_directory), ["decode.num_gpus=0"])
    assert (settings.prefill.replicas, settings.prefill.num_gpus, settings.decode.num_gpus) == (1, 0, 0)
