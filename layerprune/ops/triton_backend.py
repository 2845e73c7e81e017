"""Puts the Triton kernels in the place of the eager reference on CUDA devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from layerprune.ops.backends import backends
from layerprune.ops.schema import LIBRARY


def install() -> None:
    """Registers the Triton kernels if they are to serve; else Triton is not even imported."""
    if backends()["cuda"].name != "triton":
        return
    from layerprune.kernels import OPERATORS

    for name, kernel in OPERATORS.items():
        LIBRARY.impl(name, _on_its_device(kernel), "CUDA")


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with its tensors' device as the current one, on which Triton launches."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        with torch.cuda.device(args[0].device):
            return kernel(*args)

    return run
