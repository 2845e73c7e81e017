"""Draws the figures of docs/performance.md and README.md from a study's results.

    python benchmarks/plots.py
    python benchmarks/plots.py benchmarks/results/study-full.json --output docs/figures/full

The same results give the same files, byte for byte. A figure of which no run is there is left out.
Each names in its description the results that it was drawn from, by `fingerprint`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from study import cost_figures as costs
from study import section_figures as sections

from layerprune.training.report_canvas import STYLE

ROOT = Path(__file__).resolve().parents[1]
RESULT, FOLDER = ROOT / "benchmarks" / "results" / "study-small.json", ROOT / "docs" / "figures"

FIGURES: dict[str, Callable[[dict], Figure | None]] = {
    "study": costs.overview,
    "accuracy-training-flops": partial(
        costs.accuracy_against, "training FLOPs, of the dense run's", costs.share("train_flops")
    ),
    "accuracy-training-time": partial(
        costs.accuracy_against, "training time, of the dense run's", costs.time("train_seconds")
    ),
    "accuracy-inference-time": partial(
        costs.accuracy_against,
        "inference time, of the dense network's",
        costs.time("inference_seconds"),
    ),
    "sections-left": sections.sections_left,
    "sections-kept": sections.sections_kept,
}
"""By the file's name."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, nargs="?", default=RESULT, help="a study's JSON file")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the figures")
    options = parser.parse_args()
    for path in written(json.loads(options.result.read_text()), options.output):
        print(path)


def written(result: dict, folder: Path) -> list[Path]:
    """Writes all figures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "path"}):
        for name, draw in FIGURES.items():
            figure = draw(result)
            if figure is not None:
                paths.append(folder / f"{name}.svg")
                paths[-1].write_text(svg(figure, fingerprint(result)))
    return paths


def fingerprint(result: dict) -> str:
    """A short name of results."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def svg(figure: Figure, description: str) -> str:
    """A figure on white, without date and version."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    metadata = nothing | {"Description": description}
    figure.savefig(buffer, format="svg", facecolor="white", metadata=metadata)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
