"""Copies between the host and an accelerator that nobody waits for when they are begun."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

_POLL_SECONDS = 2e-5
_ALIGNMENT = 16
"""Bytes: the most that a kernel reads at a time."""


class HostCopy:
    """Tensors on their way to the host.

    From an accelerator they go to pinned memory, behind the work that is queued by now. `get` may
    have to wait for that work, never for what was queued since, so the accelerator does not run dry
    of it. Tensors on the host are taken as they are: they must not change until `get`.

    Args:
        tensors: what to copy; gradients do not flow.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Of other accelerators nothing says when an asynchronous copy is there.
        self._tensors = [
            tensor.detach().to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors
        ]
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def get(self) -> list[Tensor]:
        """The tensors on the host."""
        for event in self._events:
            # With a pause: a wait in the driver would keep a processor busy that a loader's worker
            # can use.
            while not event.query():
                time.sleep(_POLL_SECONDS)
        self._events = []
        return self._tensors


def to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors of the host on a device, in one copy.

    Args:
        tensors: contiguous; on the host.
        device: where they go.

    Returns:
        The tensors themselves where the device is the host, else views of one new tensor.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    ends, total = [], 0
    for tensor in tensors:
        ends.append((total, total + tensor.nbytes))
        total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    pinned = torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=True)
    for tensor, (start, end) in zip(tensors, ends, strict=True):
        _part(pinned, start, end, tensor).copy_(tensor)
    there = pinned.to(device, non_blocking=True)
    return [
        _part(there, start, end, tensor) for tensor, (start, end) in zip(tensors, ends, strict=True)
    ]


def _part(buffer: Tensor, start: int, end: int, like: Tensor) -> Tensor:
    return buffer[start:end].view(like.dtype).view(like.shape)
