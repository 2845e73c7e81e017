"""Which device tests run on: ``pytest tests/ops --device cuda``, and tests that need a GPU."""

import os

import pytest
import torch

# Its key does not cover an operator's Python backward: a test would run that of an earlier source.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="device for the tests of the operations (tests/ops), such as cuda; default: cpu",
    )


def pytest_configure(config):
    device = torch.device(config.getoption("device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch finds no CUDA device here")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
