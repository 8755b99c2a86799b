"""Fixtures of the tests of `lserve poc`."""

from pathlib import Path

import pytest
from poc_documents import make_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One document of each kind."""
    return make_folder(tmp_path / "documents")
