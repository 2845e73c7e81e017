"""Whether unedited models compute the same, bit for bit, when sections are gated and when removed.

    OMP_NUM_THREADS=1 python benchmarks/verify_families.py --output benchmarks/results/families.json

The models are those of tests/support/families.py: as small as their constructors make them, with
random weights. Of each, every section is left out alone, and all of them together.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import sys
from pathlib import Path

import torch
from machine import facts, write_result

from layerprune import verify
from layerprune.compaction import remove_sections
from layerprune.gate import Gate
from layerprune.sections.discovery import survey

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from families import FAMILIES, Family  # noqa: E402

ROWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for name in options.families:
        rows.append({"family": name, **of_family(FAMILIES[name])})
        print(f"{name:28} {len(rows[-1]['sections'])} sections, {rows[-1]['difference']:g}")
    result = facts("cpu")
    for library in sorted({family.library for family in FAMILIES.values()}):
        result["versions"][library] = importlib.metadata.version(library)
    if options.output is not None:
        write_result(options.output, {**result, "rows": rows})


def of_family(family: Family) -> dict:
    """What is found in a model, and the largest difference over all structures."""
    torch.manual_seed(0)
    model = family.build()
    for value in model.state_dict().values():
        if (
            value.is_floating_point()
        ):  # away from initial values, with which some branches do nothing
            value.add_(0.2 * torch.rand_like(value) - 0.1)
    inputs = family.inputs(ROWS)
    found = survey(model, inputs)
    names = [section.name for section in found.sections]
    structures = [*([name] for name in names), names]
    return {
        "label": family.label,
        "library": family.library,
        "class": type(model).__name__,
        "sections": [{"name": each.name, "kind": each.kind} for each in found.sections],
        "left_out": found.left_out,
        "structures": len(structures),
        "difference": max(difference(model, inputs, found.sections, gone) for gone in structures),
    }


def difference(model, inputs, sections, gone) -> float:
    """Between a model in which sections are gated off and one from which they are removed."""
    gated, compacted = copy.deepcopy(model), copy.deepcopy(model)
    for section in sections:
        gate = Gate(section.name)
        gate.is_open = section.name not in gone
        section.in_model(gated).attach(gate)
    removed = [section.in_model(compacted) for section in sections if section.name in gone]
    remove_sections(compacted, removed)
    return verify(gated, compacted, [inputs])


if __name__ == "__main__":
    main()
