"""Writes the tables of docs/performance.md from the results.

    python benchmarks/tables.py

A table stands between `<!-- table: name -->` and `<!-- /table -->`; the name is that of a result in
benchmarks/results, or "gpu" for all that GPUs' folders hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import training
from figures import median, times_compile

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
NOTHING = (
    "**No GPU has run the CUDA and Triton kernels yet: there are no figures of theirs.**\n"
    "`make gpu-check` measures them on a machine with one."
)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every table made anew."""

    def fill(match: re.Match) -> str:
        return f"{match[1]}{section(match[2], results)}\n{match[3]}"

    return BLOCK.sub(fill, page)


def section(name: str, results: Path) -> str:
    """What belongs between the markers."""
    if name == "gpu":
        folders = sorted(path.parent for path in results.glob("*/operations.json"))
        return "\n\n".join(map(of_gpu, folders)) or NOTHING
    result = json.loads((results / f"{name}.json").read_text())
    make = {"operations-cpu": cpu_operations, "digits-resnet32-overhead": cpu_overhead}
    return f"{measured_on(result)}\n\n{make.get(name, training.markdown)(result)}"


def measured_on(result: dict) -> str:
    """Where a result comes from, in a line."""
    versions = dict(result["versions"])
    ours, torch = versions.pop("layerprune"), versions.pop("torch")
    parts = [result["device"], f"torch {torch}", *(f"{k} {v}" for k, v in versions.items())]
    if "driver" in result:
        parts.append(f"driver {result['driver']}")
    return (
        f"{', '.join(parts)}, {result['threads']} threads; layerprune {ours} at "
        f"`{(result['commit'] or 'unknown')[:12]}`."
    )


def table(columns: dict[str, Callable[[dict], str]], rows: list[dict]) -> str:
    """Rows as a table in markdown; a column that has nothing to say of a row stays empty there."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(make(row) for make in columns.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def of(key: str, form: str) -> Callable[[dict], str]:
    """A column that is an entry of the row."""
    return lambda row: form.format(row[key]) if key in row else ""


LABELS = {
    "operation": of("operation", "`{}`"),
    "shape": of("shape", "{}"),
    "dtype": of("dtype", "{}"),
    "rows": of("share", "{:.0%}"),
}


def cpu_operations(result: dict) -> str:
    columns = LABELS | {
        "memory": of("memory", "{}"),
        "µs": lambda row: f"{row['ours']['median_us']:,.0f}",
        "GB/s": of("gb_per_second", "{:.1f}"),
        "of `clone`": of("clone_fraction", "{:.0%}"),
        "of copy": of("copy_fraction", "{:.0%}"),
        "x eager": of("times_eager", "{:.2f}"),
        "x compile": of("times_compile", "{:.2f}"),
    }
    return table(columns, result["rows"])


def cpu_overhead(result: dict) -> str:
    columns = {
        "plain step": of("plain_step_seconds", "{:.4f} s"),
        "step with open gates": of("gated_step_seconds", "{:.4f} s"),
        "draw and step of theta": of("draw_and_step_seconds", "{:.5f} s"),
        "share": of("draw_and_step_share", "{:.1%}"),
    }
    return table(columns, [result])


def of_gpu(folder: Path) -> str:
    """All about one kind of GPU."""
    operations = json.loads((folder / "operations.json").read_text())
    parts = [f"### {operations['device']}", measured_on(operations), figures(operations)]
    small = [row for row in operations["rows"] if "launches" in row]
    large = [row for row in operations["rows"] if "launches" not in row]
    parts += [gpu_small(small), gpu_operations(large)]
    if (folder / "training-step.json").exists():
        steps = json.loads((folder / "training-step.json").read_text())
        heading = f"A training step of ResNet-50, batch {steps['batch_size']}."
        parts += [f"{heading} {measured_on(steps)}", figures(steps), training_steps(steps)]
    return "\n\n".join(parts)


def figures(result: dict) -> str:
    columns = {
        "figure": of("name", "{}"),
        "target": of("target", "{}"),
        "measured": of("measured", "{:.3f}"),
        "met": lambda figure: "yes" if figure["met"] else "**no**",
    }
    return table(columns, result["figures"])


def against(kind: str) -> Callable[[dict], str]:
    """A column: how many times as fast as a baseline forward and backward are."""

    def make(row: dict) -> str:
        if kind not in row["times"]:
            return ""
        return f"{median(row, kind, 'both') / median(row, 'ours', 'both'):.2f}"

    return make


def gpu_operations(rows: list[dict]) -> str:
    def fraction(part: str) -> Callable[[dict], str]:
        return lambda row: f"{row['of_copy'][part]:.0%}"

    def compiled(row: dict) -> str:
        gain = times_compile(row)
        return "" if gain is None else f"{gain:.2f}"

    def peak(kind: str) -> Callable[[dict], str]:
        return lambda row: f"{row['peak_bytes'][kind] / 2**20:,.0f}"

    columns = LABELS | {
        "family": of("family", "{}"),
        "forward µs": lambda row: f"{median(row, 'ours', 'forward'):,.0f}",
        "of copy": fraction("forward"),
        "backward µs": lambda row: f"{median(row, 'ours', 'backward'):,.0f}",
        "of copy ": fraction("backward"),
        "x eager": against("eager"),
        "x compile": compiled,
        "x dinov2": against("dinov2"),
        "peak MiB": peak("ours"),
        "eager's": peak("eager"),
    }
    return table(columns, rows)


def gpu_small(rows: list[dict]) -> str:
    columns = {
        "operation": LABELS["operation"],
        "shape": LABELS["shape"],
        "family": of("family", "{}"),
        "kernels": lambda row: f"{row['launches']['kernels']:g}",
        "µs in them": lambda row: f"{row['launches']['kernels_us']:.1f}",
        "memsets": lambda row: f"{row['launches']['memsets']:g}",
        "µs in those": lambda row: f"{row['launches']['memsets_us']:.1f}",
        "µs a call": lambda row: f"{median(row, 'ours', 'both'):,.0f}",
        "x eager": against("eager"),
    }
    return table(columns, rows)


def training_steps(result: dict) -> str:
    columns = {
        "sections": of("sections", "{}"),
        "step": lambda row: f"{1e3 * row['median_s']:.1f} ms",
        "on the device": lambda row: f"{1e3 * row['device_s']:.1f} ms",
        "kernels": of("kernels", "{:,.0f}"),
        "waits": lambda row: f"{sum(row['waits'].values()):g}",
        "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:,.0f}",
    }
    return table(columns, result["rows"])


if __name__ == "__main__":
    main()
