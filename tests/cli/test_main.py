"""The command line: settings as flags, and errors in one line."""

import socket
from pathlib import Path

import pytest

from lserve.cli.main import main, split_settings
from lserve.engine.errors import SettingsError


def test_settings_are_taken_out_of_the_arguments() -> None:
    rest, settings = split_settings(
        ["up", "serve.yaml", "--decode.max_batch_size", "8", "--port", "1234", "--cache.kv_dtype=int8", "--dashboard"]
    )
    assert rest == ["up", "serve.yaml", "--port", "1234", "--dashboard"]
    assert settings == ["decode.max_batch_size=8", "cache.kv_dtype=int8"]


def test_a_value_may_hold_anything() -> None:
    assert split_settings(["--redis.url=redis://host:1/0?a=b", "--model.served_name", "--x"]) == (
        [],
        ["redis.url=redis://host:1/0?a=b", "model.served_name=--x"],
    )


def test_a_setting_without_a_value_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"--decode\.replicas needs a value"):
        split_settings(["up", "--decode.replicas"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--model", "m", "--decode.replica", "3"], "unknown setting 'decode.replica' (value 3)"),
        (["up", "--model", "m", "--cache.kv_dtype", "int3"], "cache.kv_dtype: input should be"),
        (["up", "--model", "m", "--port", "99999"], "router.port: input should be less than or equal to 65535"),
        (["up", "nowhere.yaml"], "cannot read settings from 'nowhere.yaml'"),
        (["up", "--model", "./nowhere.gguf"], "nowhere.gguf"),
        (["status", "--decode.replicas", "3"], "lserve status takes no settings"),
        (["status", "--url", "http://127.0.0.1:1"], "no answer from http://127.0.0.1:1"),
    ],
)
def test_errors_are_one_line_that_names_the_value(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith("lserve: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_refused_before_anything_starts(
    demo_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["up", "--model", str(demo_directory), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capfd.readouterr().err


def test_an_unsupported_model_is_refused_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert main(["up", "--model", str(tmp_path)]) == 1
    assert "architectures 'GPT2LMHeadModel' is not supported" in capfd.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert {"up", "status"} <= set(capsys.readouterr().out.split())
