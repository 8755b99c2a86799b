"""Devices that a test runs on: always a CPU, and a GPU where there is one."""

import pytest
import torch

CUDA_MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
DEVICES = ("cpu", pytest.param("cuda", marks=CUDA_MARKS))
