"""The Triton kernels, run by Triton's interpreter on the CPU: `TRITON_INTERPRET=1`.

From a tree that is not installed there is no `layerprune.kernels`.
"""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED or importlib.util.find_spec("layerprune.kernels") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poison():
    """Within a test torch fills uninitialised memory: NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
