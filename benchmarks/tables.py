"""Writes the tables of docs/*.md and README.md from the results.

    python benchmarks/tables.py

A table stands between `<!-- table: name -->` and `<!-- /table -->`; the name is that of a result in
benchmarks/results, or "gpu" for all that GPUs' folders hold. A study makes several tables: the name
is then `study-small:methods`, with one of `study.tables.BLOCKS` behind the colon, or `machine`.
Those of recipes, loading and families make two each.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from family_tables import every, summary
from figures import median, times_compile
from markdown_table import Column, figures, of, table
from recipe_tables import loading_parts, loading_rates, recipe_counts, recipe_steps
from study.tables import BLOCKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    *(ROOT / "docs" / f"{name}.md" for name in ("models", "performance", "recipes")),
    ROOT / "README.md",
)
# Beside a table of the same result that says what it was measured on.
FURTHER = {
    "recipes-cpu:counts": recipe_counts,
    "loading-cpu:parts": loading_parts,
    "families:summary": summary,
}
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
NOTHING = (
    "**No GPU has run the CUDA and Triton kernels yet: there are no figures of theirs.**\n"
    "`make gpu-check` measures them on a machine with one."
)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))


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
    file, _, block = name.partition(":")
    path = results / f"{file}.json"
    if name in FURTHER:
        return FURTHER[name](json.loads(path.read_text()))
    if block:
        return of_study(path, block)
    make = {
        "operations-cpu": cpu_operations,
        "digits-resnet32-overhead": cpu_overhead,
        "recipes-cpu": recipe_steps,
        "loading-cpu": loading_rates,
        "families": every,
    }
    result = json.loads(path.read_text())
    return f"{measured_on(result)}\n\n{make[name](result)}"


def of_study(path: Path, block: str) -> str:
    """One table of a study, or what it was measured on."""
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if not result["rows"]:
        return f"**`{path.stem}` has not been run yet.**"
    if block != "machine":
        return BLOCKS[block](result)
    rows = result["rows"]
    told = [
        measured_on(result),
        f"{len(rows)} runs, {sum(r['seconds'] for r in rows) / 60:.0f} minutes of a core.",
    ]
    for key in ("commit", "device"):
        several = len({row[key] for row in rows})
        if several > 1:
            told.append(f"The runs are of {several} {key}s; this is the first one's.")
    return " ".join(told)


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
    parts = [f"### {operations['device']}", measured_on(operations), figures(operations["figures"])]
    small = [row for row in operations["rows"] if "launches" in row]
    large = [row for row in operations["rows"] if "launches" not in row]
    parts += [gpu_small(small), gpu_operations(large)]
    if (folder / "training-step.json").exists():
        steps = json.loads((folder / "training-step.json").read_text())
        heading = f"A training step of ResNet-50, batch {steps['batch_size']}."
        parts += [
            f"{heading} {measured_on(steps)}",
            figures(steps["figures"]),
            training_steps(steps),
        ]
    return "\n\n".join(parts)


def against(kind: str) -> Column:
    """A column: how many times as fast as a baseline forward and backward are."""

    def make(row: dict) -> str:
        if kind not in row["times"]:
            return ""
        return f"{median(row, kind, 'both') / median(row, 'ours', 'both'):.2f}"

    return make


def gpu_operations(rows: list[dict]) -> str:
    def fraction(part: str) -> Column:
        return lambda row: f"{row['of_copy'][part]:.0%}"

    def compiled(row: dict) -> str:
        gain = times_compile(row)
        return "" if gain is None else f"{gain:.2f}"

    def peak(kind: str) -> Column:
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
