"""The README's Python runs as it stands, but for the model, which is the demo model on disk."""

import re
from pathlib import Path

import pytest

from lserve.cli.demo_model import demo_model

README = Path(__file__).parent.parent / "README.md"


def test_the_offline_example_prints_an_answer_per_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    match = re.search(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert match is not None
    code = match[1].replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(demo_model()))
    assert str(demo_model()) in code
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "return" in printed
