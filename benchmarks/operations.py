"""What the operations cost: time, bytes, GB/s, against a copy, eager PyTorch and torch.compile.

    python benchmarks/operations.py --output benchmarks/results/operations-cpu.json

Every case is measured in one run with its baselines, by turns, after their results were compared:
  eager     the same written in PyTorch, running on the same rows
  compile   that under torch.compile
  copy      `clone` of as many tensors as the operation returns, all held until the last is made:
            what memory allows, page faults included
Bytes are those that must be moved, each tensor read or written once. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import MEMORY, facts, hand_out_memory, write_result
from torch import Tensor

from layerprune import ops
from layerprune.ops import draw, projected_step

SHAPES = {
    "ResNet-50": (128, 64, 28, 28),
    "ResNet-56": (128, 16, 32, 32),
    "ViT-B": (32, 197, 768),
}
SHARES = (1.0, 0.75, 0.5, 0.25)
PROBED = 0.125
"""Share of the running rows whose gate gets a gradient, where not all rows run."""


@dataclass
class Case:
    """One operation on one kind of input, and its baselines: functions without arguments."""

    name: str
    ours: Callable[[], object]
    eager: Callable[[], object]
    compile: Callable[[], object] | None = None
    moved: int = 0
    """Bytes."""
    copied: list[Tensor] = field(default_factory=list)
    """What the copy clones: tensors of the shapes that the operation returns."""
    labels: dict = field(default_factory=dict)
    tolerance: float | None = None
    """Of the results' comparison with eager, relative to the largest value; None: no comparison."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, metavar="SHARE")
    parser.add_argument("--memory", nargs="+", choices=[*MEMORY, "as-is"], default=MEMORY)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    print(
        f"{'operation':27}{'shape':25}{'dtype':10}{'share':>6} {'memory':8}{'us':>9}{'GB/s':>7}"
        f"{'of copy':>9}{'x eager':>9}{'x compile':>10}"
    )
    rows = []
    # Fresh memory first: what was once handed out for reuse is reused.
    for memory in sorted(options.memory):
        if memory != "as-is":
            hand_out_memory(memory)
        for shape in options.shapes:
            for dtype in options.dtypes:
                for share in options.shares:
                    for case in residual_cases(shape, getattr(torch, dtype), share):
                        rows.append(measure(case, options, memory))
    for case in gate_cases():
        rows.append(measure(case, options, None))
    result = {**facts("cpu"), "rounds": options.rounds, "rows": rows}
    if options.output is not None:
        write_result(options.output, result)


def residual_cases(shape: str, dtype: torch.dtype, share: float) -> list[Case]:
    """Operations 2 and 3 with ReLU, forward and backward, and the gather in front of a branch."""
    generator = torch.Generator().manual_seed(0)
    size = SHAPES[shape]
    batch = size[0]
    x, branch, grad = (torch.randn(size, generator=generator).to(dtype) for _ in range(3))
    x.requires_grad_()
    row = x[0].numel() * x.element_size()
    column = (batch,) + (1,) * (x.dim() - 1)
    labels = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "share": share}
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    common = {"labels": labels, "tolerance": tolerance}

    if share == 1:
        branch.requires_grad_()
        gate = torch.rand(batch, generator=generator).requires_grad_()

        def ours() -> tuple[Tensor, ...]:
            y = ops.gated_residual(x, branch, gate, None, "relu")
            return y, *torch.autograd.grad(y, (x, branch, gate), grad)

        def formula(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
            return torch.relu(x + gate.to(x.dtype).view(column) * branch)

        def eager(function: Callable = formula) -> tuple[Tensor, ...]:
            y = function(x, branch, gate)
            return y, *torch.autograd.grad(y, (x, branch, gate), grad)

        compiled = torch.compile(formula, dynamic=False)
        residual = Case(
            "gated_residual",
            ours,
            eager,
            lambda: eager(compiled),
            # x, branch -> y; the gradient, y, branch -> two gradients
            moved=8 * batch * row,
            copied=[grad] * 3,
            **common,
        )
        theta, state = torch.tensor(0.5), torch.tensor([1, 2, 0])
        _, drawn = ops.sampled_gated_residual(x, branch, theta, state, 0)

        def sampled() -> tuple[Tensor, ...]:
            y, _ = ops.sampled_gated_residual(x, branch, theta, state, 0, "relu")
            return y, *torch.autograd.grad(y, (x, branch), grad)

        def drop_path(function: Callable = formula) -> tuple[Tensor, ...]:
            torch.bernoulli(theta.expand(batch))  # what it would draw; the results compare on ours
            y = function(x, branch, drawn)
            return y, *torch.autograd.grad(y, (x, branch), grad)

        running = int(drawn.sum())
        stochastic = Case(
            "sampled_gated_residual",
            sampled,
            drop_path,
            lambda: drop_path(compiled),
            # A closed row reads no branch; its gradient is written all the same.
            moved=(6 * batch + running) * row,
            copied=[grad] * 3,
            **common,
        )
        return [residual, stochastic]

    count = round(share * batch)
    probed = round(PROBED * count)
    rows = torch.randperm(batch, generator=generator)[:count].sort().values
    probes = rows[:: max(1, count // probed)][:probed].contiguous()
    slot = torch.full((batch,), -1, dtype=torch.int32)
    slot[rows] = torch.arange(count, dtype=torch.int32)
    gate = (slot >= 0).float()
    gate[probes] = torch.rand(probed, generator=generator)
    gate.requires_grad_()

    def section() -> tuple[Tensor, ...]:
        taken, rest = ops.take_rows(x, rows, exclusive=True)
        y = ops.gated_residual(rest, taken, gate, slot, "relu", gate_grad_rows=probes)
        return y, *torch.autograd.grad(y, (x, gate), grad)

    def subset(x: Tensor, gate: Tensor, rows: Tensor) -> Tensor:
        scale = gate[rows].to(x.dtype).view(-1, *column[1:])
        return torch.relu(x.index_add(0, rows, scale * x[rows]))

    def eager_section(function: Callable = subset) -> tuple[Tensor, ...]:
        y = function(x, gate, rows)
        d_x, d_gate = torch.autograd.grad(y, (x, gate), grad)
        return y, d_x, torch.zeros_like(d_gate).index_copy_(0, probes, d_gate[probes])

    compiled = torch.compile(subset, dynamic=False)
    return [
        Case(
            "take_rows + gated_residual",
            section,
            eager_section,
            lambda: eager_section(compiled),
            # gather; the sum; probe rows kept; its backward; the rows' gradient added
            moved=(2 * count + (2 * batch + count) + 2 * probed
                   + (3 * batch + count + probed) + 3 * count) * row,
            copied=[grad, grad, grad[:count], grad[:count]],
            **common,
        )
    ]  # fmt: skip


def gate_cases() -> list[Case]:
    """Operations 1 and 4: the draw of a ResNet-110 and the step of a thousand sections."""
    generator = torch.Generator().manual_seed(0)
    theta, rate = torch.rand(54, generator=generator), torch.full((54,), 1 / 16)
    numbers = iter(range(1, 1 << 30))

    def sample() -> object:  # another draw every time: a processor learns one by heart
        state = torch.tensor([1, next(numbers), 0])
        return ops.sample_gates(theta, 256, state, rate, min_rows=2)

    def sample_eager() -> object:
        state = torch.tensor([1, next(numbers), 0])
        return draw.reference(theta, 256, state, rate, 2, 1, "systematic")

    count, rows = 1000, 256
    slope = torch.randn(count, rows, generator=generator)
    counted = torch.rand(count, rows, generator=generator) < 1 / 8
    penalty, free = torch.full((count,), 0.05), torch.ones(count, dtype=torch.bool)
    numbers_of_step = {"horizon": 50.0, "noise_factor": 4.0, "decay": 0.98, "confidence": 2.0}

    def state() -> tuple[Tensor, ...]:
        zeros = torch.zeros(projected_step.STATISTICS, count)
        return torch.full((count,), 0.5), zeros, torch.zeros(count, dtype=torch.bool)

    mine, theirs = state(), state()
    return [
        Case("sample_gates", sample, sample_eager, labels={"shape": "54 sections, 256 rows"}),
        Case(
            "projected_gate_step_",
            lambda: ops.projected_gate_step_(
                *mine, slope, counted, penalty, free, **numbers_of_step, max_descending=4
            ),
            lambda: projected_step.reference(
                *theirs, slope, counted, penalty, free, *numbers_of_step.values(), 4
            ),
            labels={"shape": "1,000 sections, 256 rows"},
        ),
    ]


def measure(case: Case, options: argparse.Namespace, memory: str | None) -> dict:
    """Compares the results, then times the case and its baselines by turns, and prints a line."""
    functions = {"ours": case.ours, "eager": case.eager}
    if case.compile is not None and not options.no_compile:
        functions["compile"] = case.compile
    if case.copied:
        functions["copy"] = lambda: [tensor.clone() for tensor in case.copied]
    if case.tolerance is not None:
        for found, want in zip(case.ours(), case.eager(), strict=True):
            error = (found.float() - want.float()).abs().max() / want.float().abs().max()
            assert error <= case.tolerance, f"{case.name} {case.labels}: results differ by {error}"
    for function in functions.values():
        for _ in range(3):
            function()
    seconds: dict[str, list[float]] = {kind: [] for kind in functions}
    for _ in range(options.rounds if case.moved else 10 * options.rounds):
        for kind, function in functions.items():
            start = time.perf_counter()
            result = function()
            seconds[kind].append(time.perf_counter() - start)
            del result
    return report(case, seconds, memory)


def report(case: Case, seconds: dict[str, list[float]], memory: str | None) -> dict:
    """The case's row of the result; prints it as a line of the table."""
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    spread = {kind: statistics.quantiles(times, n=5) for kind, times in seconds.items()}
    row = {"operation": case.name, **case.labels, "memory": memory, "bytes": case.moved or None}
    for kind in seconds:
        row[kind] = {
            "median_us": 1e6 * median[kind],
            "p20_us": 1e6 * spread[kind][0],
            "p80_us": 1e6 * spread[kind][-1],
        }
    for kind in ("eager", "compile"):
        if kind in median:
            row[f"times_{kind}"] = median[kind] / median["ours"]
    if case.copied:
        copied = sum(2 * tensor.numel() * tensor.element_size() for tensor in case.copied)
        row["gb_per_second"] = case.moved / median["ours"] / 1e9
        row["copy_gb_per_second"] = copied / median["copy"] / 1e9
        row["copy_fraction"] = row["gb_per_second"] / row["copy_gb_per_second"]
    text = f"{case.name:27}{row['shape']:25}{row.get('dtype', ''):10}{row.get('share', ''):>6} "
    text += f"{memory or '':8}{row['ours']['median_us']:9.0f}"
    text += f"{row['gb_per_second']:7.1f}{row['copy_fraction']:9.0%}" if case.copied else " " * 16
    text += f"{row['times_eager']:9.2f}"
    print(text + (f"{row['times_compile']:10.2f}" if "times_compile" in row else ""), flush=True)
    return row


if __name__ == "__main__":
    main()
