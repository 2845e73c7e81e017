"""Schemes of initialisation, to see whether the result depends on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SCHEMES: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}
"""Beside the networks' own, which is Kaiming's for convolutions."""


@torch.no_grad()
def initialise(model: nn.Module, scheme: str | None) -> None:
    """Draws the weights of all convolutions and linear layers anew; None leaves them."""
    if scheme is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # Drawn into contiguous memory: a scheme may view it as a matrix.
            drawn = torch.empty_like(module.weight, memory_format=torch.contiguous_format)
            module.weight.copy_(SCHEMES[scheme](drawn))
