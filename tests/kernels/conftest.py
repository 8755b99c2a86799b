"""Kernel tests run compiled on a GPU where there is one, and in Triton's interpreter on CPU tensors elsewhere."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # read when a kernel is defined, so it is set before any test imports lserve.kernels.gpu
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Names the marker for runs that see this folder alone."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need the card: the interpreter is slow, and wrong in bfloat16 and fp8."""
    if not ON_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> str:
    """Where kernel tests put their tensors."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def _fresh_random_data() -> None:
    # pytest shows the line when the test fails
    print("torch seed", torch.seed())
