"""`lserve redis` and `lserve drain` where there is no cluster to speak to."""

import pytest

from lserve.cli.main import main


@pytest.mark.parametrize("command", [["redis", "--memory-gib", "1"], ["drain", "--timeout-s", "1"]])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, on import
def test_no_cluster_is_an_error_of_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(command) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("lserve: ")
    assert "127.0.0.1:1" in error
    assert "\n" not in error
