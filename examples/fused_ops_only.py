"""Stochastic depth in a network of one's own, by `layerprune.ops` alone: nothing is pruned.

Trains three copies of a network on the same draws: with the usual expression, with the operation
that is drop_path, add and ReLU in one, and with branches that run only on the rows that need them.
They come to the same weights; how long each took is printed for information. Needs scikit-learn
besides the core; less than a minute on 2 cores.
"""

import time
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn

from layerprune import ops

BLOCKS, WIDTH, BATCH = 6, 24, 128


class Draw(NamedTuple):
    """The gates of a step: their probabilities, which draw it is, and what was drawn."""

    keep: torch.Tensor
    rng_state: torch.Tensor
    drawn: ops.GateDraw


def usual(x, branch, block, draw):
    gate = draw.drawn.gates[block].view(-1, 1, 1, 1)
    return torch.relu(x + gate * branch(x))


def fused(x, branch, block, draw):
    # Draws by itself, and the same: a gate depends on rng_state, block and row, and nothing else.
    y, _ = ops.sampled_gated_residual(
        x, branch(x), draw.keep[block], draw.rng_state, block, activation="relu"
    )
    return y


def skipping(x, branch, block, draw):
    gates, slots, rows, _, counts = (part[block] for part in draw.drawn)
    x_rows, x = ops.take_rows(x, rows[: counts[0]])
    return ops.gated_residual(x, branch(x_rows), gates, slots, activation="relu")


def expected(x, branch, block, keep):
    """What evaluation computes: every branch, weighted by how likely it was to be on."""
    return torch.relu(x + keep[block] * branch(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        # With BatchNorm a row's result would depend on which others run.
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
                nn.GroupNorm(4, WIDTH),
                nn.ReLU(),
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            )
            for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x, residual, draw):
        x = torch.relu(self.stem(x))
        for block, branch in enumerate(self.branches):
            x = residual(x, branch, block, draw)
        return self.head(x.amax((2, 3)))


def main(steps=100):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(ops.backends()[device])
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
    labels = torch.tensor(data.target, device=device)

    keep = torch.linspace(1.0, 0.5, BLOCKS, device=device)
    no_probes = torch.zeros(BLOCKS, device=device)
    networks, optimizers, seconds = {}, {}, {}
    for way in (usual, fused, skipping):
        torch.manual_seed(0)
        networks[way] = Network().to(device)
        optimizers[way] = torch.optim.AdamW(networks[way].parameters(), lr=3e-3)
        seconds[way] = 0.0

    for step in range(steps):
        batch = torch.randint(360, len(images), (BATCH,))  # the first 360 images are for the test
        rng_state = torch.tensor([0, step, 0], device=device)  # seed, number of the draw, first row
        drawn = ops.sample_gates(keep, BATCH, rng_state, no_probes, scheme="independent")
        draw = Draw(keep, rng_state, drawn)
        for way, network in networks.items():
            start = time.perf_counter()
            outputs = network(images[batch], way, draw)
            loss = nn.functional.cross_entropy(outputs, labels[batch])
            loss.backward()
            optimizers[way].step()
            optimizers[way].zero_grad()
            loss.item()  # waits for a GPU
            seconds[way] += time.perf_counter() - start

    for way, network in networks.items():
        pairs = zip(networks[usual].parameters(), network.parameters(), strict=True)
        apart = max((a - b).abs().max().item() for a, b in pairs)
        with torch.no_grad():
            right = network(images[:360], expected, keep).argmax(1) == labels[:360]
        print(
            f"{way.__name__:8}  {seconds[way]:5.1f} s  accuracy {right.float().mean():.1%}  "
            f"largest difference of a weight from the usual one's: {apart:.1e}"
        )
    return {way.__name__: network for way, network in networks.items()}


if __name__ == "__main__":
    main()
