"""Forwards beside those of the training, which must not notice them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class RandomState:
    """The default generators' state, of the CPU and of the devices that hold the model."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self.capture()

    def capture(self) -> None:
        """Notes the present state."""
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in self._devices}

    def restore(self) -> None:
        """Goes back to the state noted."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def side_forward(model: nn.Module) -> Iterator[None]:
    """Lets a forward leave no graph, and the buffers and torch's random states as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    held = [(module, dict(module._buffers)) for module in model.modules()]
    random = RandomState(model)
    # A compiler would compile anew for it, and draw other masks than it did with a graph.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            random.restore()
            for module, named in held:  # a forward may have put another one in its place
                module._buffers.clear()
                module._buffers.update(named)
            for buffer, saved in buffers:
                # Through `.data`: a training forward may have saved the buffer for its backward,
                # which would take the restored value for a change.
                buffer.data.copy_(saved)
