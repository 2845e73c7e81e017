"""Gate gradients: what a backward says about every probed row of every section."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layerprune.transfer import HostCopy


class GateGradients:
    """The gate gradients of some draws, on their way to the host.

    Args:
        draws: for each draw the gates that its sections used, and bool ``[L, B]``: the rows whose
            gradient is evidence.
    """

    def __init__(self, draws: list[tuple[dict[int, Tensor], Tensor]]) -> None:
        given = [
            {index: gate.grad for index, gate in gates.items() if gate.grad is not None}
            for gates, _ in draws
        ]
        self._graded = [graded for _, graded in draws]
        self._indices = [list(gradients) for gradients in given]
        self._copy = HostCopy([torch.stack(list(g.values())) for g in given if g])

    def evidence(self, rows_factor: Callable[[int], float], scale: float) -> tuple[Tensor, Tensor]:
        """The slopes, and which of them count.

        Args:
            rows_factor: what turns dC/dgate of a row into the derivative of the row's own loss, by
                batch size.
            scale: divisor of the gradients.

        Returns:
            ``slope`` float32 ``[L, R]`` and ``counted`` bool ``[L, R]`` over all rows of all draws.
            A missing gradient is no evidence; it is not a zero.
        """
        slopes, counts = [], []
        arrived = iter(self._copy.get())
        for graded, indices in zip(self._graded, self._indices, strict=True):
            slope = torch.zeros_like(graded, dtype=torch.float32)
            heard = graded.new_zeros(graded.shape[0])
            if indices:
                slope[indices] = next(arrived) * (rows_factor(graded.shape[1]) / scale)
                heard[indices] = True
            slopes.append(slope)
            counts.append(graded & heard[:, None])
        return torch.cat(slopes, 1), torch.cat(counts, 1)
