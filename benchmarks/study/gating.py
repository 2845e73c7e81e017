"""Gates that are not the pruner's, on the same sections and through the same fused operation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerprune import ops
from layerprune.gate import Gate, SectionDraw
from layerprune.sections import Section
from layerprune.training.images import Stream, derived_seed

MIN_ROWS = 4
"""Rows on which a branch runs at the least: as the pruner's default."""


def attach_gates(sections: Sequence[Section]) -> list[Gate]:
    """Gives each section a gate to hand draws to."""
    gates = [Gate(section.name) for section in sections]
    for section, gate in zip(sections, gates, strict=True):
        gate.owned = True
        section.attach(gate)
    return gates


def detach_gates(sections: Sequence[Section]) -> None:
    """Leaves the sections plain."""
    for section in sections:
        section.detach()


class FixedGates:
    """Stochastic depth: gates of fixed keep probability, which falls linearly with depth.

    Huang et al., "Deep networks with stochastic depth" (2016): section l of L is kept with
    probability 1 - l / (2 L). Gates are drawn per row and by a systematic draw, and a kept branch
    is divided by its probability in training in place of being multiplied by it in evaluation.

    Args:
        sections: all of a network, in their order.
        seed: of the draws.
        run_all_rows: run every branch on all rows, as implementations that multiply its output do.
    """

    def __init__(
        self, sections: Sequence[Section], seed: int, *, run_all_rows: bool = False
    ) -> None:
        self.sections = sections
        self.gates = attach_gates(sections)
        count = len(sections)
        self.theta = 1 - torch.arange(1, count + 1) / (2 * count)
        self.seed = derived_seed(seed, 0, Stream.ORDER) % 2**63
        self.run_all_rows = run_all_rows
        self.draws = 0
        self.device = next(sections[0].module.parameters()).device

    def draw(self, batch_size: int) -> list[int]:
        """Hands out the gates of a batch; returns the rows on which each branch runs."""
        drawn = ops.sample_gates(
            self.theta,
            batch_size,
            torch.tensor([self.seed, self.draws, 0]),
            torch.zeros_like(self.theta),
            min_rows=MIN_ROWS,
            row_multiple=batch_size if self.run_all_rows else 1,
        )
        self.draws += 1
        counts = drawn.counts[:, 0].tolist()
        values = (drawn.gates / self.theta[:, None]).to(self.device)
        rows, slots = drawn.rows.to(self.device), drawn.slots.to(self.device)
        for index, (gate, count) in enumerate(zip(self.gates, counts, strict=True)):
            gate.draw = SectionDraw(
                values[index], slots[index], rows[index][:count], rows[index][:0]
            )
        return counts

    def step(self, progress: float) -> None:
        """Nothing is learned."""

    def finish(self) -> list[str]:
        """All sections stay."""
        detach_gates(self.sections)
        return []


class HardConcreteGates:
    """L0 regularisation: stretched and clipped binary concrete gates with learned locations.

    Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization"
    (2018), with their temperature and stretch. Each row has gates of its own; where a gate is 0 the
    branch does not run, which changes no gradient. In evaluation a gate has the value of their
    equation 13, and sections where that is 0 leave the network.

    Args:
        sections: all of a network, in their order.
        penalty: float32 ``[L]``, what a gate that is not 0 adds to the loss.
        seed: of the draws.
        device: where the gates are.
        lr: learning rate of Adam on the locations; falls with the cosine of the rest.

    Raises:
        TypeError: if a gate's value cannot be put into a section's branch at the end.
    """

    temperature = 2 / 3
    low, high = -0.1, 1.1
    keep = 0.9
    """Probability at the start that a gate is not 0."""

    def __init__(
        self,
        sections: Sequence[Section],
        penalty: Tensor,
        seed: int,
        device: torch.device,
        lr: float = 0.05,
    ) -> None:
        self.sections = sections
        self.scaled = [scaled_layer(section.module) for section in sections]
        self.gates = attach_gates(sections)
        self.penalty = penalty.to(device)
        self.generator = torch.Generator(device).manual_seed(seed % 2**63)
        self.bias = self.temperature * math.log(-self.low / self.high)
        start = math.log(self.keep / (1 - self.keep)) + self.bias
        self.location = torch.full((len(sections),), start, device=device, requires_grad=True)
        self.lr = lr
        self.optimizer = torch.optim.Adam([self.location], lr)

    def _stretched(self, concrete: Tensor) -> Tensor:
        return (concrete * (self.high - self.low) + self.low).clamp(0, 1)

    def draw(self, batch_size: int) -> list[int]:
        """Hands out the gates of a batch; returns the rows on which each branch runs."""
        shape, device = (len(self.sections), batch_size), self.location.device
        uniform = torch.rand(shape, generator=self.generator, device=device).clamp(1e-6, 1 - 1e-6)
        noise = uniform.log() - (-uniform).log1p()
        values = self._stretched(torch.sigmoid((noise + self.location[:, None]) / self.temperature))
        counts = (values > 0).sum(1).clamp(min=min(MIN_ROWS, batch_size)).tolist()
        for index, (gate, count) in enumerate(zip(self.gates, counts, strict=True)):
            rows = values[index].detach().topk(count).indices.sort().values
            slot = torch.full((batch_size,), -1, dtype=torch.int32, device=device)
            slot[rows] = torch.arange(count, dtype=torch.int32, device=device)
            gate.draw = SectionDraw(values[index], slot, rows, rows)
        return counts

    def step(self, progress: float) -> None:
        """Moves the locations by the loss's gradient and the penalty's."""
        active = torch.sigmoid(self.location - self.bias)
        (self.penalty * active).sum().backward()
        self.optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * progress)) / 2
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def finish(self) -> list[str]:
        """Multiplies every branch by its gate; returns the sections whose gate is 0."""
        detach_gates(self.sections)
        gates = self._stretched(torch.sigmoid(self.location)).tolist()
        for layer, gate in zip(self.scaled, gates, strict=True):
            scale(layer, gate)
        return [
            section.name for section, gate in zip(self.sections, gates, strict=True) if gate == 0
        ]


def scaled_layer(section: nn.Module) -> nn.Module:
    """The last layer with weights of a section's branch, by which its output can be multiplied.

    Raises:
        TypeError: if there is no branch, or what comes after that layer lets no factor through.
    """
    branch = getattr(section, "branch", None)
    if branch is None:
        raise TypeError(f"no factor can be put into the branch of a {type(section).__name__}")
    for layer in reversed(branch if isinstance(branch, nn.Sequential) else [branch]):
        if isinstance(layer, nn.BatchNorm2d | nn.Linear | nn.Conv2d):
            return layer
        if not isinstance(layer, nn.ReLU | nn.MaxPool2d):
            break
    raise TypeError(f"no factor can be put into a branch that ends in {type(layer).__name__}")


def scale(layer: nn.Module, factor: float) -> None:
    """Multiplies a layer's output by a factor >= 0."""
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.mul_(factor)
