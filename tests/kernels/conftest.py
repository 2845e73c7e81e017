"""The Triton kernels, run by Triton's interpreter on the CPU: `TRITON_INTERPRET=1`."""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poison():
    """Within a test torch fills uninitialised memory: NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
