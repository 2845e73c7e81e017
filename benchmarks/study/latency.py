"""How long a plain network takes to classify images."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from layerprune.cost import evaluating
from layerprune.training.data import DataSplits
from layerprune.training.evaluation import BATCH
from layerprune.training.sampling import test_loader

_REPEATS = 15


@torch.no_grad()
def inference_seconds(model: nn.Module, splits: DataSplits, device: torch.device) -> float:
    """Median time of a forward of one batch of test images in evaluation mode, in seconds.

    The images are on the device; three forwards are not counted.
    """
    images, _ = next(iter(test_loader(splits, BATCH)))
    images = images.to(device)
    times = []
    with evaluating(model):
        for _ in range(3 + _REPEATS):
            start = time.perf_counter()
            model(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[3:])
