"""What the gates themselves cost: draw and step as a share of a training step with every gate open.

    python benchmarks/overhead.py --recipe digits-resnet32 \
        --output benchmarks/results/digits-resnet32-overhead.json

The same network takes the same steps without a pruner, and with one whose thetas are held at 1
(probes on). Medians over the steps, the two kinds by turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import facts, write_result
from torch.nn import functional as F

import layerprune
from layerprune.models import build
from layerprune.training import recipe
from layerprune.training.data import load
from layerprune.training.sampling import train_loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default=recipe.DEFAULT)
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    chosen = recipe.load(options.recipe)
    data = load(chosen.dataset, options.data_dir, train_subset=chosen.train_subset)
    batches = list(train_loader(data, chosen.batch_size, seed=0, epoch=0, drop_last=True))
    runs = {"plain": Run(chosen, data, gated=False), "gated": Run(chosen, data, gated=True)}
    for run in runs.values():
        for _ in range(10):
            run.step(*batches[0])
    runs["gated"].pruner.ledger.draw_seconds = runs["gated"].pruner.ledger.step_seconds = 0.0
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for step in range(options.steps):
        for kind, run in runs.items():
            start = time.perf_counter()
            run.step(*batches[step % len(batches)])
            seconds[kind].append(time.perf_counter() - start)
    ledger = runs["gated"].pruner.ledger
    gated = statistics.median(seconds["gated"])
    own = (ledger.draw_seconds + ledger.step_seconds) / options.steps
    result = {
        "recipe": chosen.as_dict(),
        **facts("cpu"),
        "plain_step_seconds": statistics.median(seconds["plain"]),
        "gated_step_seconds": gated,
        "draw_and_step_seconds": own,
        "draw_and_step_share": own / gated,
    }
    print(
        f"plain step {1e3 * result['plain_step_seconds']:.2f} ms, with open gates "
        f"{1e3 * gated:.2f} ms; draw and step {1e3 * own:.2f} ms, {own / gated:.1%} of it"
    )
    if options.output is not None:
        write_result(options.output, result)


class Run:
    """A network in training, with or without a pruner that never closes a gate."""

    def __init__(self, chosen: recipe.Recipe, data: object, gated: bool) -> None:
        torch.manual_seed(0)
        shape = {"in_channels": data.in_channels, "image_size": data.image_size}
        self.model = build(chosen.model, num_classes=data.num_classes, **shape, **chosen.model_args)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.pruner = None
        if gated:
            # A warm-up that outlasts the measurement: theta stays where it is, probes are drawn.
            config = replace(
                layerprune.PruneConfig(), theta_init=1.0, warm_up=0.3, warm_up_limit=0.3
            )
            self.pruner = layerprune.LayerPruner(
                self.model,
                example_inputs=torch.zeros(2, data.in_channels, data.image_size, data.image_size),
                total_steps=1_000_000,
                strength=chosen.strength,
                config=config,
            )

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step(self.optimizer)
        self.optimizer.zero_grad()


if __name__ == "__main__":
    main()
