"""The operations on real shapes, each beside what one would write in PyTorch for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerprune import ops
from layerprune.ops import draw, projected_step

SHAPES = {
    "ResNet-50": (128, 64, 28, 28),
    "ResNet-56": (128, 16, 32, 32),
    "ViT-B": (32, 197, 768),
}
PROBED = 0.125
"""Share of the running rows whose gate gets a gradient, where not all rows run."""

Function = Callable[[], tuple[Tensor, ...]]


@dataclass
class Case:
    """One operation on one kind of input, and its baselines: functions without arguments.

    Attributes:
        name: The operation.
        labels: Shape, dtype and share of running rows.
        ours: Runs it, forward and backward; the results.
        eager: The same in PyTorch.
        compiled: The same under torch.compile, or None.
        moved: Bytes that this operation has to move: each tensor of it read or written once.
        returned: Tensors of the shapes that it returns, for the copies to clone.
        tolerance: Of the comparison of results: mean difference, relative to the mean value.
    """

    name: str
    labels: dict
    ours: Function
    eager: Function
    compiled: Function | None = None
    moved: int = 0
    returned: list[Tensor] = field(default_factory=list)
    tolerance: float = 1e-5


def linear_sum(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The gated residual sum, all rows."""
    return x + gate.to(x.dtype) * branch


def linear_subset_sum(
    x: Tensor, gate: Tensor, probe_gate: Tensor, rows: Tensor, probes: Tensor
) -> Tensor:
    """A section on some rows: gather, an identity in place of the branch, the sum.

    Gates of probe rows have a gradient, those of the other rows none: the term of the probes is 0.
    """
    taken = x.index_select(0, rows)
    y = x.index_add(0, rows, gate.index_select(0, rows).to(x.dtype) * taken)
    probed = x.index_select(0, probes).detach()
    return y.index_add(0, probes, (probe_gate - probe_gate.detach()).to(x.dtype) * probed)


def plain_sum(*args: Tensor) -> Tensor:
    """`linear_sum` with ReLU."""
    return torch.relu(linear_sum(*args))


def subset_sum(*args: Tensor) -> Tensor:
    """`linear_subset_sum` with ReLU."""
    return torch.relu(linear_subset_sum(*args))


def mean_error(found: Tensor, want: Tensor) -> float:
    """Mean difference relative to the mean value.

    In the mean: where a sum rounds to either side of 0, ReLU's gradients are far apart.
    """
    # A GPU's tensors are large, and its float64 is slow.
    wide = torch.float64 if want.device.type == "cpu" else torch.float32
    found, want = found.detach().to(wide), want.detach().to(wide)
    return float((found - want).abs().mean() / want.abs().mean().clamp(min=1e-30))


def residual_cases(shape: str, dtype: torch.dtype, share: float, compiling: bool) -> Iterator[Case]:
    """Operations 2 and 3 with ReLU, and a section with the gather in front."""
    labels = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "share": share}
    common = {"labels": labels, "tolerance": 1e-5 if dtype == torch.float32 else 0.1}
    size = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x, branch, grad = (torch.randn(size, generator=generator).to(dtype) for _ in range(3))
    x.requires_grad_()
    branch.requires_grad_()
    if share == 1:
        yield _residual(x, branch, grad, common, compiling)
        yield _stochastic_depth(x, branch, grad, common, compiling)
    else:
        yield _section(x, grad, share, common, compiling)


def _row_bytes(x: Tensor) -> int:
    return x[0].numel() * x.element_size()


def _compiled(function: Callable, compiling: bool) -> Callable | None:
    return torch.compile(function, dynamic=False, fullgraph=True) if compiling else None


def _residual(x: Tensor, branch: Tensor, grad: Tensor, common: dict, compiling: bool) -> Case:
    batch = x.shape[0]
    gate = torch.rand(batch, generator=torch.Generator().manual_seed(1)).requires_grad_()
    column = (batch,) + (1,) * (x.dim() - 1)
    compiled = _compiled(plain_sum, compiling)

    def ours() -> tuple[Tensor, ...]:
        y = ops.gated_residual(x, branch, gate, None, "relu")
        return y, *torch.autograd.grad(y, (x, branch, gate), grad)

    def plain(function: Callable = plain_sum) -> tuple[Tensor, ...]:
        y = function(x, branch, gate.view(column))
        return y, *torch.autograd.grad(y, (x, branch, gate), grad)

    return Case(
        "gated_residual",
        ours=ours,
        eager=plain,
        compiled=compiled and (lambda: plain(compiled)),
        # x, branch -> y; the gradient, y, branch -> two gradients.
        moved=8 * batch * _row_bytes(x),
        returned=[grad] * 3,
        **common,
    )


def _stochastic_depth(
    x: Tensor, branch: Tensor, grad: Tensor, common: dict, compiling: bool
) -> Case:
    batch, theta, state = x.shape[0], torch.tensor(0.5), torch.tensor([1, 2, 0])
    _, drawn = ops.sampled_gated_residual(x, branch, theta, state, 0)
    weights = drawn.view((batch,) + (1,) * (x.dim() - 1))
    compiled = _compiled(plain_sum, compiling)

    def ours() -> tuple[Tensor, ...]:
        y, _ = ops.sampled_gated_residual(x, branch, theta, state, 0, "relu")
        return y, *torch.autograd.grad(y, (x, branch), grad)

    def plain(function: Callable = plain_sum) -> tuple[Tensor, ...]:
        torch.bernoulli(theta.expand(batch))  # what it would draw; results compare on our draw
        y = function(x, branch, weights)
        return y, *torch.autograd.grad(y, (x, branch), grad)

    return Case(
        "sampled_gated_residual",
        ours=ours,
        eager=plain,
        compiled=compiled and (lambda: plain(compiled)),
        # As above without the branch in the backward; a closed row reads none forward either.
        moved=(6 * batch + int(drawn.sum())) * _row_bytes(x),
        returned=[grad] * 3,
        **common,
    )


def _section(x: Tensor, grad: Tensor, share: float, common: dict, compiling: bool) -> Case:
    generator = torch.Generator().manual_seed(2)
    batch = x.shape[0]
    count = max(1, round(share * batch))
    probed = max(1, round(PROBED * count))
    rows = torch.randperm(batch, generator=generator)[:count].sort().values
    probes = rows[:: count // probed][:probed].contiguous()
    slot = torch.full((batch,), -1, dtype=torch.int32)
    slot[rows] = torch.arange(count, dtype=torch.int32)
    gate = (slot >= 0).float()
    gate[probes] = torch.rand(probed, generator=generator)
    column = (-1,) + (1,) * (x.dim() - 1)
    probe_gate = gate[probes].view(column).requires_grad_()
    weights = gate.clone().view(column)
    gate.requires_grad_()
    compiled = _compiled(subset_sum, compiling)

    def ours() -> tuple[Tensor, ...]:
        taken, rest = ops.take_rows(x, rows, exclusive=True)
        y = ops.gated_residual(rest, taken, gate, slot, "relu", gate_grad_rows=probes)
        d_x, d_gate = torch.autograd.grad(y, (x, gate), grad)
        return y, d_x, d_gate[probes].view(column)

    def plain(function: Callable = subset_sum) -> tuple[Tensor, ...]:
        y = function(x, weights, probe_gate, rows, probes)
        return y, *torch.autograd.grad(y, (x, probe_gate), grad)

    # Gather; sum; probe rows kept; its backward; the rows' gradient added to the shortcut's.
    passes = 2 * count + (2 * batch + count) + 2 * probed + (3 * batch + count + probed) + 3 * count
    return Case(
        "take_rows + gated_residual",
        ours=ours,
        eager=plain,
        compiled=compiled and (lambda: plain(compiled)),
        moved=passes * _row_bytes(x),
        returned=[grad, grad, grad[:count], grad[:count]],
        **common,
    )


def gate_cases(device: str = "cpu") -> Iterator[Case]:
    """Operations 1 and 4: a draw, another one every time, and a step; beside the specification."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(54, generator=generator).to(device)
    rate = torch.full((54,), 1 / 16, device=device)
    # A processor learns a draw by heart that comes again and again.
    states = [torch.tensor([1, number, 0], device=device) for number in range(1000)]
    mine, theirs = iter(states * 1000), iter(states * 1000)
    yield Case(
        "sample_gates",
        labels={"shape": "54 sections, 256 rows"},
        ours=lambda: ops.sample_gates(theta, 256, next(mine), rate, min_rows=2),
        eager=lambda: draw.reference(theta, 256, next(theirs), rate, 2, 1, "systematic"),
    )

    sections, rows = 1000, 256
    slope = torch.randn(sections, rows, generator=generator)
    counted = torch.rand(sections, rows, generator=generator) < 1 / 8
    penalty, free = torch.full((sections,), 0.05), torch.ones(sections, dtype=torch.bool)
    given = tuple(tensor.to(device) for tensor in (slope, counted, penalty, free))
    numbers = {"horizon": 50.0, "noise_factor": 4.0, "decay": 0.98, "confidence": 2.0}
    states = [
        (
            torch.full((sections,), 0.5, device=device),
            torch.zeros(projected_step.STATISTICS, sections, device=device),
            torch.zeros(sections, dtype=torch.bool, device=device),
        )
        for _ in range(2)
    ]

    def ours() -> tuple[Tensor, ...]:
        ops.projected_gate_step_(*states[0], *given, **numbers, max_descending=4)
        return states[0]

    def eager() -> tuple[Tensor, ...]:
        projected_step.reference(*states[1], *given, *numbers.values(), 4)
        return states[1]

    yield Case("projected_gate_step_", {"shape": "1,000 sections, 256 rows"}, ours, eager)
