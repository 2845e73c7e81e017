"""What gates cost, and closed ones save, in a ResNet-50's training step on a GPU.

    python benchmarks/training_step.py

torchvision's ResNet-50 in channels_last under bfloat16 autocast, SGD with momentum, random images
that lie on the device. The same step is timed in blocks, by turns:
  plain    without a pruner
  open     every theta at 1: gates are drawn, some probed, and every row runs
  half     every theta at 0.5
  removed  all sections gone: the part of the step that does not depend on theta
A step's time is the wall clock's over a block of steps, at whose end the device is waited for. A
profile counts the calls within a step that make the host wait for all that is queued ("waits"), and
those that ask whether the step before is done ("polls"): the pruner does, for its evidence, which
holds the host at most one step ahead of the device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from device_operations import peak_bytes
from device_trace import launches, polls, synchronisations, traced
from figures import training_figures
from machine import facts, results_folder, write_result
from torch.nn import functional as F
from torchvision.models import resnet50

import layerprune

THETAS = {"plain": None, "open": 1.0, "half": 0.5, "removed": 0.0}
PROFILED_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use")
    images = torch.randn(options.batch_size, 3, 224, 224, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (options.batch_size,), device="cuda")
    runs = {kind: Run(theta, images, labels) for kind, theta in THETAS.items()}
    seconds = measure(runs, options.blocks, options.steps)
    rows = [row(kind, run, seconds[kind]) for kind, run in runs.items()]
    result = {
        **facts("cuda"),
        "batch_size": options.batch_size,
        "steps": options.blocks * options.steps,
        "figures": training_figures(rows),
        "rows": rows,
    }
    for one in rows:
        print(f"{one['sections']:<8} {1e3 * one['median_s']:8.2f} ms, waits {one['waits']}")
    for figure in result["figures"]:
        print(f"{figure['measured']:.3f} {figure['target']}  {figure['name']}")
    write_result(options.output or results_folder() / "training-step.json", result)


class Run:
    """A network in training.

    Args:
        theta: keep probability of every section, held; 0 for none in the network, None for a plain
            network.
        images: one batch.
        labels: of the images.
        model: the network; torchvision's ResNet-50 unless given.
    """

    def __init__(
        self,
        theta: float | None,
        images: torch.Tensor,
        labels: torch.Tensor,
        model: torch.nn.Module | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.images, self.labels = images, labels
        self.model = (model or resnet50()).to(images.device, memory_format=torch.channels_last)
        self.pruner = None
        if theta is not None:
            # A warm-up that outlasts the measurement: theta stays where it is, probes are drawn.
            config = layerprune.PruneConfig(theta_init=theta, warm_up=0.3, warm_up_limit=0.3)
            self.pruner = layerprune.LayerPruner(
                self.model,
                example_inputs=images[:2],
                total_steps=1_000_000,
                strength=0.01,
                config=config,
            )
        if theta == 0:
            self.pruner.strip()
            self.pruner = None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> None:
        with torch.autocast(self.images.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step(self.optimizer)
        self.optimizer.zero_grad()


def measure(runs: dict[str, Run], blocks: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step, by kind and block."""
    for run in runs.values():
        for _ in range(steps):
            run.step()
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(blocks):
        for kind, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                run.step()
            torch.cuda.synchronize()
            seconds[kind].append((time.perf_counter() - start) / steps)
    return seconds


def row(kind: str, run: Run, seconds: list[float]) -> dict:
    """A kind's row of the result."""
    events = traced(run.step, PROFILED_STEPS)
    ran = launches(events, PROFILED_STEPS)
    return {
        "sections": kind,
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "device_s": 1e-6 * ran["device_us"],
        "kernels": ran["kernels"],
        "waits": synchronisations(events, PROFILED_STEPS),
        "polls": polls(events, PROFILED_STEPS),
        "peak_bytes": peak_bytes(run.step),
    }


if __name__ == "__main__":
    main()
