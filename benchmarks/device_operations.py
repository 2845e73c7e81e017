"""The operations on a GPU: every family of kernels in a process of its own, one result.

`operations.py` has what is measured; this is how. Times are those between two CUDA events, with the
second-level cache overwritten before every call (`triton.testing.do_bench`). For backward alone the
graph is there before. Operations that launch little are profiled too: what they run on the device
and for how long, their inputs in the cache as they are in training. torch.compile takes long and
is measured beside the first family only; its rows stand beside both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from device_cases import cases
from device_stream import ALL, SHAPES, DeviceCase, Stream
from device_trace import launches, traced
from figures import median, operation_figures, times_compile
from machine import facts, results_folder, write_result
from operation_cases import Case, gate_cases, mean_error
from torch import Tensor
from torch._functorch import config as functorch_config

import layerprune
from layerprune.ops.backends import VARIABLE

FAMILIES = ("compiled", "triton")
PARTS = ("forward", "backward", "both")
SHARED = ("compile", "max-autotune")
PROFILED_CALLS = 50

Clock = Callable[[Callable[[], object]], list[float]]
"""Median, 20 and 80 % quantile of a function's time in milliseconds."""


def run(options: argparse.Namespace) -> None:
    """Measures every family, writes the result after each, and says which failed."""
    output = options.output or results_folder() / "operations.json"
    start = time.monotonic()
    failed = []
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            part = Path(folder, f"{family}.json")
            command = [sys.executable, __file__, "--output", str(part)]
            command += ["--shapes", *options.shapes, "--dtypes", *options.dtypes]
            command += ["--shares", *map(str, options.shares)]
            if options.no_compile or any("compile" in row["times"] for row in rows):
                command.append("--no-compile")
            print(f"== {family}", flush=True)
            done = subprocess.run(command, env={**os.environ, VARIABLE: family})
            if done.returncode != 0:
                failed.append(family)
            if not part.exists():
                continue
            rows += json.loads(part.read_text())
            share_baselines(rows)
            result = facts("cuda") | {"seconds": round(time.monotonic() - start)}
            write_result(output, result | {"figures": operation_figures(rows), "rows": rows})
    for figure in operation_figures(rows):
        met = "met" if figure["met"] else "MISSED"
        print(f"{met:<7}{figure['measured']:8.3f} {figure['target']:<8}{figure['name']}")
    if failed:
        sys.exit(f"not everything of {' and '.join(failed)} could be measured: see above")


def share_baselines(rows: list[dict]) -> None:
    """Gives rows of the other family what was measured once for both."""
    measured: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("operation", "shape", "dtype", "share"))
        mine = {kind: row["times"][kind] for kind in SHARED if kind in row["times"]}
        row["times"] = measured.setdefault(key, mine) | row["times"]


def measure(case: DeviceCase, clock: Clock) -> dict:
    """Compares a case with its baselines, then times them and copies of as many bytes."""
    expected = case.ours.results(case.grad)
    for kind, way in case.baselines.items():
        for name, found in way.results(case.grad).items():
            mine, ours = way.agreeing.get(name, (ALL, ALL))
            want = expected[name][ours]
            error = mean_error(found[mine].reshape(want.shape), want)
            assert error <= case.tolerance, (
                f"{case.name} {case.labels}: {name} of {kind} differs by {error}"
            )
    del expected, found, want
    times: dict[str, dict] = {}
    peaks = {}
    for kind, way in {"ours": case.ours, **case.baselines}.items():
        y = way.forward()
        times[kind] = {
            "forward": quantiles(clock(way.forward)),
            "backward": quantiles(clock(partial(way.gradients, y, case.grad))),
        }
        del y
        whole = partial(way.both, case.grad)
        times[kind]["both"] = quantiles(clock(whole))
        peaks[kind] = peak_bytes(whole)
    moved = case.moved | {"both": sum(case.moved.values())}
    times["copy"] = {part: quantiles(clock(copy_of(moved[part], case.grad))) for part in PARTS}
    row = {"operation": case.name, **case.labels, "bytes": moved, "times": times}
    row["peak_bytes"] = peaks
    row["of_copy"] = {part: median(row, "copy", part) / median(row, "ours", part) for part in PARTS}
    return row


def measure_small(case: Case, clock: Clock) -> dict:
    """The draw or the step: its time, and what a profile says of it."""
    for found, want in zip(case.ours(), case.eager(), strict=True):
        error = mean_error(found, want)
        assert error <= case.tolerance, f"{case.name} differs by {error}"
    return {
        "operation": case.name,
        **case.labels,
        "times": {
            kind: {"both": quantiles(clock(function))}
            for kind, function in (("ours", case.ours), ("eager", case.eager))
        },
        "launches": launches(traced(case.ours, PROFILED_CALLS), PROFILED_CALLS),
    }


def quantiles(milliseconds: list[float]) -> dict[str, float]:
    """As in a result."""
    names = ("median_us", "p20_us", "p80_us")
    return {name: round(1e3 * value, 2) for name, value in zip(names, milliseconds, strict=True)}


def copy_of(moved: int, like: Tensor) -> Callable[[], Tensor]:
    """A copy that reads and writes so many bytes in all."""
    # Of noise: a GPU may be faster where all bits are 0.
    source = torch.randint(256, (moved // 2,), dtype=torch.uint8, device=like.device)
    return partial(torch.empty_like(source).copy_, source)


def peak_bytes(function: Callable[[], object]) -> int:
    """Memory that a call takes at the most beyond what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def measurements(options: argparse.Namespace) -> Iterator[Callable[[], dict]]:
    """One for each row of this process's family."""
    from triton.testing import do_bench  # which a torch without CUDA comes without

    clock = partial(do_bench, warmup=10, rep=40, quantiles=[0.5, 0.2, 0.8])
    for case in gate_cases("cuda"):
        yield partial(measure_small, case, clock)
    for name in options.shapes:
        for dtype in options.dtypes:
            kind = (name, SHAPES[name], getattr(torch, dtype), "cuda")
            stream = Stream(*kind, compiling=not options.no_compile)
            for case in cases(stream, options.shares):
                yield partial(measure, case, clock)


def line(row: dict) -> str:
    """A row as a line of the log."""
    labels = " ".join(str(row[name]) for name in ("operation", "shape"))
    if "launches" in row:
        return f"{labels}: {row['launches']}"
    gain, times = times_compile(row), {kind: median(row, kind, "both") for kind in row["times"]}
    shares = ", ".join(f"{part} {row['of_copy'][part]:.0%}" for part in PARTS)
    against = "" if gain is None else f"; {gain:.2f} x torch.compile"
    return f"{labels} {row['dtype']} {row['share']:.0%}: of copy {shares}{against}; us {times}"


def main() -> None:
    """One family, of which this process has the kernels."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--shares", nargs="+", type=float)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    family, serving = os.environ[VARIABLE], layerprune.backends()["cuda"]
    if serving.name != family:
        sys.exit(f"{family} kernels are wanted, but CUDA is served by {serving}")
    # torch.compile's backward alone is timed again and again on one graph.
    functorch_config.donated_buffer = False
    rows, failures = [], 0
    for measurement in measurements(options):
        try:
            rows.append({"family": family, **measurement()})
        except Exception:  # the others are worth having
            traceback.print_exc()
            failures += 1
            continue
        print(line(rows[-1]), flush=True)
    write_result(options.output, rows)
    if failures:
        sys.exit(f"{failures} cases of {family} failed")


if __name__ == "__main__":
    main()
