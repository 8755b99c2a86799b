"""The settings schema: what it accepts, and how it names what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from lserve.deployments.settings import load_settings
from lserve.engine.errors import SettingsError

MINIMAL = {"model": {"path": "/models/demo"}}


def test_defaults_need_only_a_model() -> None:
    settings = load_settings(MINIMAL)
    assert settings.served_name == "demo"
    assert settings.prefill.local_threshold == 512
    assert settings.engine_config().scheduler.chunk_size == settings.prefill.chunk_size
    assert settings.engine_config().device == "cpu"


def test_a_role_with_a_gpu_runs_on_cuda() -> None:
    settings = load_settings({**MINIMAL, "prefill": {"num_gpus": 1}})
    assert settings.engine_config("prefill").device == "cuda"
    assert settings.engine_config("decode").device == "cpu"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"path": "/a/Some-Model.Q4_1.gguf"}, "Some-Model.Q4_1"),
        ({"path": "Qwen/Qwen2.5-0.5B"}, "Qwen/Qwen2.5-0.5B"),
        ({"path": "/a/b", "served_name": "mine"}, "mine"),
    ],
)
def test_served_name(model: dict[str, Any], name: str) -> None:
    assert load_settings({"model": model}).served_name == name


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ({}, ["model", "missing"]),
        ({**MINIMAL, "cahce": {}}, ["cahce"]),
        ({**MINIMAL, "cache": {"kv_dtyp": "int4"}}, ["cache.kv_dtyp", "int4"]),
        ({**MINIMAL, "cache": {"kv_dtype": "int5"}}, ["cache.kv_dtype", "int5"]),
        ({**MINIMAL, "cache": {"logical_page_size": 7}}, ["cache.logical_page_size", "7"]),
        ({**MINIMAL, "sparsity": {"token_budget": 64}}, ["sparsity.token_budget", "64"]),
        ({**MINIMAL, "prefill": {"chunk_size": 100}}, ["prefill.chunk_size", "100"]),
        ({**MINIMAL, "router": {"port": 70000}}, ["router.port", "70000"]),
        ({**MINIMAL, "router": {"api_key_sha256": ["abc"]}}, ["router.api_key_sha256", "abc"]),
        ({**MINIMAL, "redis": {"url": "http://x"}}, ["redis.url", "http://x"]),
        ({**MINIMAL, "decode": None}, ["decode", "None"]),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(block: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(block)
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in names)


def test_a_password_in_the_redis_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({**MINIMAL, "redis": {"url": "redis://:hunter2@host"}})
    assert "password_env" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "model: {path: /m}\ndecode: {max_batch_size: 8}",
        "args:\n  model: {path: /m}\n  decode: {max_batch_size: 8}",
        "http_options: {}\napplications:\n- name: a\n  args:\n    model: {path: /m}\n    decode: {max_batch_size: 8}",
    ],
)
def test_a_file_holds_the_block_or_a_serve_config_around_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert load_settings(file).decode.max_batch_size == 8


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x80", "applications: []"])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match=r"serve\.yaml"):
        load_settings(file)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        load_settings("/nowhere.yaml")


def test_overrides_are_read_as_yaml_and_make_sections() -> None:
    overrides = ["sparsity.token_budget=null", "cache.kv_dtype=int8", "prefill.resources={gpu: 1}", "router.port=0"]
    settings = load_settings(MINIMAL, overrides)
    assert settings.sparsity.token_budget is None
    assert settings.cache.kv_dtype == "int8"
    assert settings.prefill.resources == {"gpu": 1.0}
    assert settings.router.port == 0


@pytest.mark.parametrize(
    "override", ["router.port", "=3", "router..port=1", "model.path.x=1", "router.port=[", "router.prt=1"]
)
def test_a_wrong_override_is_refused(override: str) -> None:
    with pytest.raises(SettingsError):
        load_settings(MINIMAL, [override])
