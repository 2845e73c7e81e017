"""Puts the Triton kernels in the place of the eager reference on CUDA devices."""

from __future__ import annotations

from layerprune.ops.backends import backends
from layerprune.ops.schema import LIBRARY


def install() -> None:
    """Registers the Triton kernels if they are to serve; else Triton is not even imported."""
    if backends()["cuda"].name != "triton":
        return
    from layerprune.kernels import OPERATORS

    for name, kernel in OPERATORS.items():
        LIBRARY.impl(name, kernel, "CUDA")
