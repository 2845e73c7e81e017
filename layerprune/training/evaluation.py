"""Accuracy and loss on the test images, and whether compaction changed the network's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from layerprune import models
from layerprune.compaction import gated_dense, verify
from layerprune.cost import evaluating
from layerprune.training.checkpoint import absent, example_inputs
from layerprune.training.data import DataSplits
from layerprune.training.sampling import test_loader

BATCH = 256
"""Images a forward; fixed, since it can change the last bit of a result."""


@torch.no_grad()
def evaluate(
    model: nn.Module, splits: DataSplits, device: torch.device, workers: int = 0
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (a fraction) over all test images, in evaluation mode."""
    loss, correct = 0.0, 0
    with evaluating(model):
        for images, labels in test_loader(splits, BATCH, workers):
            images, labels = images.to(device), labels.to(device)
            outputs = model(images)
            loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
            correct += int((outputs.argmax(1) == labels).sum())
    return loss / len(splits.test), correct / len(splits.test)


def compaction_difference(
    compacted: nn.Module,
    structure: Mapping[str, Any],
    splits: DataSplits,
    device: torch.device,
    workers: int = 0,
) -> float:
    """Largest difference between the compacted network's outputs and the gated one's.

    The gated one is built anew, dense, from ``structure``, with the eliminated sections' gates
    closed. Compared in evaluation mode over all test images; 0.0 is equality bit for bit.
    """
    builder = structure["builder"]
    with torch.random.fork_rng(devices=[]):
        dense = models.build(builder["name"], **builder["kwargs"])
    gated = gated_dense(dense, compacted, absent(structure), example_inputs(builder["kwargs"]))
    loader = test_loader(splits, BATCH, workers)
    return verify(gated.to(device), compacted, (images.to(device) for images, _ in loader))
