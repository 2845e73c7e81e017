"""What the operations cost: time, bytes, GB/s, against copies, eager PyTorch and torch.compile.

    python benchmarks/operations.py --output benchmarks/results/operations-cpu.json
    python benchmarks/operations.py --device cuda

The second one writes to the GPU's folder in benchmarks/results, and `device_operations` says how it
measures. What follows is of the first.

Every case is measured in one run with its baselines, by turns, after their results were compared:
  eager     the same as one writes it in PyTorch, on the same rows; for the draw and the step the
            eager specification
  compile   that under torch.compile
  clone     `clone` of as many tensors as the operation returns, all held until the last is made
  copy      the same with the operations' own loop, its stores and its large pages (`take_rows` of
            all rows)
GB/s are the bytes that the operation has to move, by the median of the rounds. "of clone" and "of
copy" compare it with theirs: above 100 % is possible, since a copy writes as much as it reads and
the operations write less.

Memory is "fresh" from the system in every call, with a page fault for every page, or "reused": a
process in training has both, by the whims of the C library.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import device_operations
import torch
from machine import MEMORY, facts, hand_out_memory, write_result
from operation_cases import SHAPES, Case, gate_cases, mean_error, residual_cases

from layerprune import ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shares", nargs="+", type=float, default=[1, 0.75, 0.5, 0.25])
    parser.add_argument("--memory", nargs="+", choices=[*MEMORY, "as-is"], default=MEMORY)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("--device cuda: there is no GPU that torch can use")
        device_operations.run(options)
        return
    print(HEADER)
    rows = []
    for memory, case in all_cases(options):
        seconds = measure(case, options.rounds)
        rows.append(figures(case, seconds) | {"memory": memory})
        print(line(rows[-1]), flush=True)
    if options.output is not None:
        write_result(options.output, {**facts("cpu"), "rounds": options.rounds, "rows": rows})


def all_cases(options: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Every case with the kind of memory that it is to be measured with, which is set."""
    # Fresh memory first: what was once handed out for reuse is reused.
    for memory in sorted(options.memory):
        if memory != "as-is":
            hand_out_memory(memory)
        for shape in options.shapes:
            for dtype in options.dtypes:
                for share in options.shares:
                    # Else compiled functions add up, and past a limit run eagerly.
                    torch._dynamo.reset()
                    kind = (shape, getattr(torch, dtype), share, not options.no_compile)
                    for case in residual_cases(*kind):
                        yield memory, case
    for case in gate_cases():
        yield memory, case


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Compares the results, then times the case and its baselines by turns: seconds by kind."""
    functions: dict[str, Callable] = {"ours": case.ours, "eager": case.eager}
    if case.compiled is not None:
        functions["compile"] = case.compiled
    expected = case.ours()
    for kind, function in functions.items():
        for found, want in zip(function() if kind != "ours" else expected, expected, strict=True):
            error = mean_error(found, want)
            assert error <= case.tolerance, f"{case.name} {case.labels}: {kind} differs by {error}"
    if case.returned:
        everything = torch.arange(case.returned[0].shape[0])
        functions["clone"] = lambda: [tensor.clone() for tensor in case.returned]
        functions["copy"] = lambda: [
            ops.take_rows(tensor, everything[: tensor.shape[0]])[0] for tensor in case.returned
        ]
    for function in functions.values():
        for _ in range(3):
            function()
    seconds: dict[str, list[float]] = {kind: [] for kind in functions}
    for _ in range(rounds if case.moved else 10 * rounds):
        for kind, function in functions.items():
            start = time.perf_counter()
            result = function()
            seconds[kind].append(time.perf_counter() - start)
            del result
    return seconds


def figures(case: Case, seconds: dict[str, list[float]]) -> dict:
    """The case's row of the result."""
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    row: dict = {"operation": case.name, **case.labels}
    for kind, times in seconds.items():
        p20, *_, p80 = statistics.quantiles(times, n=5)
        row[kind] = {"median_us": 1e6 * median[kind], "p20_us": 1e6 * p20, "p80_us": 1e6 * p80}
    for kind in ("eager", "compile"):
        if kind in median:
            row[f"times_{kind}"] = median[kind] / median["ours"]
    if case.moved:
        copied = 2 * sum(tensor.numel() * tensor.element_size() for tensor in case.returned)
        row["bytes"] = case.moved
        row["gb_per_second"] = case.moved / median["ours"] / 1e9
        for kind in ("clone", "copy"):
            row[f"{kind}_gb_per_second"] = copied / median[kind] / 1e9
            row[f"{kind}_fraction"] = row["gb_per_second"] / row[f"{kind}_gb_per_second"]
    return row


COLUMNS = (
    ("operation", 27, "operation", "{}"),
    ("shape", 25, "shape", "{}"),
    ("dtype", 9, "dtype", "{}"),
    ("share", 7, "share", "{:.2f}"),
    ("memory", 8, "memory", "{}"),
    ("us", 8, "us", "{:.0f}"),
    ("GB/s", 7, "gb_per_second", "{:.1f}"),
    ("of clone", 10, "clone_fraction", "{:.0%}"),
    ("of copy", 9, "copy_fraction", "{:.0%}"),
    ("x eager", 9, "times_eager", "{:.2f}"),
    ("x compile", 11, "times_compile", "{:.2f}"),
)
HEADER = "".join(f"{title:<{width}}" for title, width, _, _ in COLUMNS)


def line(row: dict) -> str:
    """A result as a line of the table."""
    flat = row | {"us": row["ours"]["median_us"]}
    return "".join(
        f"{form.format(flat[key]) if key in flat else '':<{width}}"
        for _, width, key, form in COLUMNS
    )


if __name__ == "__main__":
    main()
