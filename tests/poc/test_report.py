"""The report: one page that needs nothing from anywhere, and says what was measured."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from stub_settings import stub_settings
from test_study import study

from lserve.poc.advice import Advice
from lserve.poc.report import RunFacts, write_report
from lserve.poc.trace_view import view

FACTS = RunFacts(
    model="a-model",
    machine="2 CPU cores (of some kind)",
    second="machine-seconds (2 CPU cores)",
    version="0.1.0",
    date="2026-11-24",
    documents=(("PDF", 3), ("text", 1)),
    characters=123_456,
    minutes=10.0,
    problems=("secret.pdf: left out, it is <encrypted> and needs a password",),
    url=None,
    price_note="3,600 of them are one hour of this machine.",
    serve_command="lserve up settings.yaml --model a-model",
)
VOID = {"meta", "br", "path", "circle", "rect"}


class Page(HTMLParser):
    """Checks that every tag is closed, and gathers what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.references += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words += " ".join(data.split()) + " "


def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forgets: int = 0) -> tuple[str, Advice]:
    made, _ = study(monkeypatch, stub_settings(forgets))
    advice = Advice(made.settings, made.run(), max_loss=2.0, answer_tokens=100)
    write_report(tmp_path / "report.html", advice, FACTS)
    return (tmp_path / "report.html").read_text(encoding="utf-8"), advice


def test_the_page_is_whole_and_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, _ = written(monkeypatch, tmp_path)
    page = Page(text)
    assert page.references == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert text.count("<svg") >= 6 and "None" not in page.words and "nan" not in page.words


def test_it_says_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, advice = written(monkeypatch, tmp_path)
    words = Page(text).words
    assert "Yes: Sparse 512, from prompts of 1,000 tokens on" in words
    assert "token_budget: 512" in words and "lserve up settings.yaml --model a-model" in words
    assert "3 PDF, 1 text documents (123,456 characters)" in words
    assert "secret.pdf: left out, it is <encrypted> and needs a password" in words
    assert advice.findings.trace is not None and advice.findings.trace.question in words
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["recommended"] == "Sparse 512" and data["lengths"] == advice.findings.lengths


def test_what_was_lost_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, _ = written(monkeypatch, tmp_path, forgets=3)
    words = Page(text).words
    assert "Some answers that were lost" in words and "I do not know." in words
    assert "Yes: Sparse 1,024" in words


def test_a_model_that_answers_nothing_gets_no_recommendation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, _ = study(monkeypatch, stub_settings())
    findings = made.run()
    findings.results = [replace(result, score=0.0) for result in findings.results]
    findings.trace = None
    write_report(tmp_path / "report.html", Advice(made.settings, findings, 2.0, 100), FACTS)
    words = Page((tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert "This run cannot say" in words and "Nothing could be compared" in words and "What to do" in words


def test_a_trace_names_the_page_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = study(monkeypatch, stub_settings())
    finding = made.run().trace
    assert finding is not None and finding.evidence is not None
    shown = view(finding)
    assert shown is not None
    start, end = finding.evidence
    holders = [page for page in shown.pages if page.found]
    assert [page.number for page in holders] == [start // 400 + 1]
    assert finding.message[start:end].startswith(holders[0].found)
    assert shown.kept == pytest.approx(0.9)
    assert shown.read == pytest.approx(2.5 / shown.num_pages)
    assert shown.untouched == shown.num_pages - 3
    assert "is &lt;this&gt;" in shown.picture or "&lt;this&gt;" in shown.picture
