"""Checks of arguments at the boundary: one clear error, at the cost of a few attribute reads."""

from __future__ import annotations

import torch
from torch import Tensor

from layerprune.ops.philox import RESERVED_ROW


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless argument ``name`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless dtype and shape of argument ``name`` are as they must be."""
    check_tensor(name, tensor)
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)},"
            f" got {tensor.dtype} of shape {list(tensor.shape)}"
        )


def check_vector(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless argument ``name`` has one dimension and the dtype."""
    check_tensor(name, tensor)
    if tensor.dtype != dtype or tensor.dim() != 1:
        raise ValueError(
            f"{name} must be {dtype} with one dimension,"
            f" got {tensor.dtype} of shape {list(tensor.shape)}"
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless argument ``name`` is on the device of the others."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {device} with the others")


def _readable(tensor: Tensor) -> bool:
    """Whether ``tensor`` has values, and they can be looked at without waiting for a device.

    Not while a graph is traced, on fakes, or within a transformation of ``torch.func``.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def check_probability(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless all values of argument ``name`` lie in [0, 1]."""
    if tensor.numel() and _readable(tensor):
        low, high = (bound.item() for bound in tensor.aminmax())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(f"{name} must lie in [0, 1], got values from {low} to {high}")


def check_rng_state(rng_state: Tensor, batch_size: int, device: torch.device) -> None:
    """Raises ValueError unless ``rng_state`` is int64 ``[3]`` and leaves the reserved row free."""
    check("rng_state", rng_state, torch.int64, (3,))
    check_device("rng_state", rng_state, device)
    if _readable(rng_state):
        first = rng_state[2].item()
        if not 0 <= first <= RESERVED_ROW - batch_size:
            raise ValueError(
                f"rng_state[2], the batch's first global row, is {first}; the batch's rows must"
                f" lie in [0, {RESERVED_ROW})"
            )
