"""`lserve poc` from the command line: a tiny model in the process, and an endpoint over real HTTP."""

import json
import re
from pathlib import Path

import pytest
from fake_pool import ByteTokenizer, FakePool
from poc_documents import write_pdf
from served_router import served_router
from test_report import Page
from tiny_model import make_tiny_model

from lserve.cli.main import main
from lserve.deployments.router import RouterCore
from lserve.deployments.settings import load_settings
from lserve.engine.head_profile import HeadProfile
from lserve.poc.settings import usable_profile

SHORT = ["--minutes", "0.2", "--max-length", "1000"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 3 layers, beside its head profile."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def data_of(report: Path) -> tuple[Page, dict[str, object]]:
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|(src|href)=", text)
    page = Page(text)
    assert page.references == []
    return page, json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_a_model_in_this_process(
    tiny_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "secret.pdf").write_bytes((Path(__file__).parent / "encrypted.pdf").read_bytes())
    (tmp_path / "q.csv").write_text("What is old?, harbour\nbad line\n")
    report, profile = tmp_path / "report.html", str(tiny_model / "heads.json")
    arguments = ["poc", str(folder), "--model", str(tiny_model), "--profile", profile, "--output", str(report), *SHORT]
    assert main([*arguments, "--questions", str(tmp_path / "q.csv")]) == 0
    said = capsys.readouterr().out
    assert "secret.pdf: left out, it is encrypted" in said and "q.csv, line 2: left out" in said
    assert "passed over, other kinds of files: 1 .png" in said
    page, data = data_of(report)
    assert "secret.pdf: left out, it is encrypted and needs a password" in page.words
    names = [setting["name"] for setting in data["settings"]]  # type: ignore[index, attr-defined]
    assert names == ["Full", "Compact", "Sparse 512", "Sparse 512 + profile"]
    timed = {(t["setting"], t["length"]) for t in data["timings"] if t["gap_s"] and t["read_s"] and t["together_s"]}  # type: ignore[attr-defined]
    assert timed >= {(name, 1000) for name in names}
    assert "memory that one request holds" in page.words.lower() and "your questions" in page.words


def test_a_profile_of_another_model_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    told: list[str] = []
    others = [HeadProfile("another", 128, 256, ((False, True),) * 3), HeadProfile.none(7, 2)]
    for number, profile in enumerate(others):
        profile.save(tmp_path / f"{number}.json")
        assert usable_profile(str(tmp_path / f"{number}.json"), str(tiny_model), told.append) is None
    assert usable_profile(None, str(tiny_model), told.append) is None
    assert usable_profile(str(tmp_path / "no.json"), str(tiny_model), told.append) is None
    expected = ("was made for model another", "has 7 layers of 2 KV heads", "no head profile", "cannot be read")
    assert all(
        words in line and "streaming heads are not tried" in line for words, line in zip(expected, told, strict=True)
    )
    assert usable_profile(str(tiny_model / "heads.json"), str(tiny_model), told.append) is not None and len(told) == 4


def test_an_endpoint(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.csv").write_text("What does the council count?, boats\n")
    pool = FakePool("It counts the boats of the harbour.")
    core = RouterCore(load_settings({"model": {"path": "/models/demo"}}), ByteTokenizer(), pool)
    with served_router(core) as url:
        arguments = ["--url", url, "--output", str(tmp_path / "r.html"), "--questions", str(tmp_path / "q.csv")]
        assert main(["poc", str(folder), *arguments, "--minutes", "0.15"]) == 0
    page, data = data_of(tmp_path / "r.html")
    assert [s["name"] for s in data["settings"]] == ["Full", "Sparse 512", "Sparse 1,024"]  # type: ignore[index, attr-defined]
    assert {(r.attention.dense, r.attention.token_budget) for r in pool.requests} == {
        (True, None),
        (False, 512),
        (False, 1024),
    }
    assert "endpoint-seconds" in page.words and "multiply them by the machines behind it" in page.words
    assert "How it looks inside" in page.words and "What does the council count?" in page.words
    assert "3,000 tokens" in page.words or "3,900 tokens" in page.words


def test_what_cannot_work_is_one_line(
    tiny_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    write_pdf(tmp_path / "empty" / "scan.pdf", [])
    for arguments, line in (
        ([str(tmp_path / "empty")], "no document with text in"),
        ([str(tmp_path / "nowhere")], "there is no file or folder"),
        ([str(folder), "--url", "http://127.0.0.1:9"], "no answer from http://127.0.0.1:9"),
        ([str(folder), "--url", "http://x", "--model", "m"], "--model is for a model in this process"),
        ([str(folder), "--gpus", "2"], "--baseline-url and --gpus need --url"),
        ([str(folder), "--minutes", "0"], "--minutes must be more than 0, got 0"),
        ([str(folder), "--output", str(tmp_path / "no" / "r.html")], "there is no folder"),
        ([str(folder), "--questions", str(tmp_path / "no.csv")], "cannot read questions from"),
        ([str(folder), "--model", "/no/such/model"], "/no/such/model"),
    ):
        assert main(["poc", *arguments]) == 1, line
        error = capsys.readouterr().err
        assert line in error and error.startswith("lserve: ") and error.count("\n") == 1, error
