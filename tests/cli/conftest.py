"""The demo model, fetched and converted once per machine, as `lserve up` does it."""

from pathlib import Path

import pytest

from lserve.cli.demo_model import demo_model


@pytest.fixture(scope="session")
def demo_directory() -> Path:
    """Directory of the demo model."""
    return demo_model()
