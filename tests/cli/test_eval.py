"""`lserve eval` from its command line: a whole small run, its files, its gates, and what it says of broken inputs."""

import json
import os
from pathlib import Path

import pytest
from fake_pool import ByteTokenizer, FakePool
from served_router import served_router
from tiny_model import make_tiny_model

from lserve.cli.main import main
from lserve.deployments.router import RouterCore
from lserve.deployments.settings import load_settings

SMALL = ["--lengths", "600", "--documents", "1", "--questions", "2", "--passage-tokens", "700"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("eval"))


def evaluate(model: Path, *arguments: str) -> int:
    settings = ["--sparsity.token_budget", "512", "--cache.retrieval_pool_bytes", str(64 << 20)]
    return main(["eval", "--model", str(model), *SMALL, *settings, *arguments])


def test_one_command_compares_dense_with_sparse(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", f"{tmp_path}/run.json", "--heat-map", f"{tmp_path}/run.png", "--state", f"{tmp_path}/state"]
    streaming = ["--sparsity.head_profile", str(model / "heads.json")]
    also = ["--also", "rule:sparsity.rule=min_max,cache.logical_page_size=16", "--budgets", "576"]
    chosen = ["--passages", "1", "--tasks", "single,people", "--gate", "bpc<=50%"]
    assert evaluate(model, *files, *streaming, *also, *chosen) == 0
    printed = capsys.readouterr().out
    assert "same next token" in printed and "gate bpc<=50%: held" in printed
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["arms"] == ["dense", "sparse", "budget 576", "rule"]
    assert [(row["task"], row["length"], row["cases"]) for row in content["tasks"]] == [
        ("single", 600, 2),
        ("people", 600, 2),
    ]
    dense, sparse, budget, rule = content["text"]
    assert dense["agreement"] == 1.0 and dense["prompt_rise"] == 0.0
    assert sparse["prompt"] == budget["prompt"] != dense["prompt"], "streaming heads change what prefill computes"
    assert content["settings"]["dense"]["sparsity"]["head_profile"] is None
    assert content["settings"]["rule"]["cache"]["logical_page_size"] == 16
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate(model, *files, *streaming, *also, *chosen, "--gate", "bpc<=-50") == 1, "another gate, same state"
    assert "gate bpc<=-50: FAILED" in capsys.readouterr().out
    assert evaluate(model, *files, *streaming, *also, *chosen, "--seed", "5") == 1
    assert "state belongs to another run: design was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gate", "speed<=2"], "unknown metric 'speed'"),
        (["--gate", "bpc<=1", "--passages", "0"], "gate 'bpc<=1': needs bits per character"),
        (["--tasks", "needle"], "unknown task 'needle'"),
        (["--lengths", "9000"], "the model reads 8192 tokens, got 9064"),
        (["--lengths", "100"], "--lengths start at 500 tokens, got 100"),
        (["--lengths", "1k"], "a count is a whole number from 1 on, got '1k'"),
        (["--questions", "13"], "--questions is at most 10, got 13"),
        (["--also", "sparsity.rule=min_max"], "--also is written NAME:KEY=VALUE"),
        (["--also", "dense:sparsity.token_budget=600"], "every arm needs its own name"),
        (["--baseline", "cache.kv_type=int8"], "unknown setting 'cache.kv_type'"),
        (["--sparsity.head_profile", "nowhere.json"], "nowhere.json cannot be read"),
        (["--data", "nowhere.txt"], "cannot read nowhere.txt: No such file or directory"),
        (["--data", os.devnull], f"{os.devnull}: 0 characters of text are too few"),
        (["--json", "nowhere/run.json"], "there is no folder nowhere"),
        (["--url", "http://127.0.0.1:1"], "--model is for an engine in this process"),
        (["--baseline-url", "http://127.0.0.1:1"], "needs --url"),
    ],
)
def test_broken_inputs_get_one_line(
    model: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model, *arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith("lserve: ") and error.count("\n") == 1 and message in error


def test_bytes_that_are_no_text_are_refused(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe" * 2000)
    assert evaluate(model, "--data", str(tmp_path / "data.bin")) == 1
    assert "data.bin is not text in UTF-8" in capfd.readouterr().err


def test_a_profile_of_another_model_is_refused(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profile = json.loads((model / "heads.json").read_text()) | {"model_fingerprint": "0123456789abcdef"}
    (tmp_path / "other.json").write_text(json.dumps(profile))
    assert evaluate(model, "--sparsity.head_profile", str(tmp_path / "other.json")) == 1
    assert "the head profile was made for model 0123456789abcdef" in capfd.readouterr().err


def test_a_running_endpoint_is_asked_densely_and_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LSERVE_API_KEYS", "key")
    pool = FakePool()
    with served_router(RouterCore(load_settings({"model": {"path": "/models/demo"}}), ByteTokenizer(), pool)) as url:
        arguments = ["--url", f"{url}/v1", "--tasks", "single", "--budgets", "1024", "--json", f"{tmp_path}/run.json"]
        assert main(["eval", *SMALL, "--lengths", "2000", *arguments]) == 0
    asked = [(request.attention.dense, request.attention.token_budget) for request in pool.requests]
    assert asked == [(True, None)] * 3 + [(False, None)] * 3 + [(False, 1024)] * 3, "the document, then two questions"
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["arms"] == ["dense", "sparse", "budget 1024"] and content["text"] == []
    assert "nothing can be compared" in capsys.readouterr().out


def test_an_endpoint_that_is_not_there_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer from http://127.0.0.1:1" in capfd.readouterr().err
