"""How long plain networks take to classify images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

_ROUNDS = 15


@torch.no_grad()
def inference_seconds(
    networks: Mapping[Hashable, nn.Module], images: Tensor
) -> dict[Hashable, float]:
    """Median times of a forward of one batch in evaluation mode, in seconds.

    The networks take turns, so that whatever else the machine does befalls all of them alike. Two
    rounds are not counted.

    Args:
        networks: by any key; set to evaluation mode.
        images: a batch, on the networks' device.
    """
    times: dict[Hashable, list[float]] = {key: [] for key in networks}
    for network in networks.values():
        network.eval()
    for _ in range(2 + _ROUNDS):
        for key, network in networks.items():
            start = time.perf_counter()
            network(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            times[key].append(time.perf_counter() - start)
    return {key: statistics.median(found[2:]) for key, found in times.items()}
