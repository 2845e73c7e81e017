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
from layerprune.ranks import Ranks
from layerprune.training.checkpoint import absent, example_inputs
from layerprune.training.data import DataSplits
from layerprune.training.group import equalize_buffers
from layerprune.training.sampling import test_loader

BATCH = 256
"""Images a forward; fixed, since it can change the last bit of a result."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    splits: DataSplits,
    device: torch.device,
    workers: int = 0,
    ranks: Ranks | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (a fraction) over all test images, in evaluation mode.

    With several ranks, which call it together, each takes its share of the batches, with rank 0's
    buffers; what comes out is what one rank would find.
    """
    ranks = ranks or Ranks()
    equalize_buffers(model, ranks)
    # By batch, and added up in their order: sums do not depend on who took which.
    losses = torch.zeros(-(-len(splits.test) // BATCH), dtype=torch.float64)
    correct = torch.zeros_like(losses)
    with evaluating(model):
        loader = test_loader(splits, BATCH, workers, start=ranks.rank, every=ranks.count)
        for place, (images, labels) in enumerate(loader):
            batch = ranks.rank + place * ranks.count
            images, labels = images.to(device), labels.to(device)
            outputs = model(images)
            losses[batch] = F.cross_entropy(outputs, labels, reduction="sum")
            correct[batch] = (outputs.argmax(1) == labels).sum()
    loss, right = (sum(ranks.gather(found).sum(0).tolist()) for found in (losses, correct))
    return loss / len(splits.test), right / len(splits.test)


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
