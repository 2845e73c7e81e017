"""What pruning while training saves, and what it costs in accuracy: dense against pruned, by seed.

    python benchmarks/training.py --recipe digits-resnet32 --seeds 0 1 2 --control \
        --output benchmarks/results/digits-resnet32.json

For every seed the same network is trained dense and pruned. With --control a third one is trained
dense from scratch without the sections that the pruned run gave up: same depth and same seed, no
search. Runs follow one another, so that none disturbs another's time. Times are those of the
training steps, fetching images included, evaluation and checkpoints apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from machine import facts, write_result

from layerprune.training import recipe, train

FIGURES = (
    "accuracy",
    "sections_kept",
    "train_flops_fraction",
    "test_flops_fraction",
    "inference_flops_fraction",
    "train_seconds",
    "first_elimination_fraction",
    "decided_by_test",
    "decided_by_rounding",
    "verify_max_abs_difference",
    "overhead",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default=recipe.DEFAULT)
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--device")
    parser.add_argument("--control", action="store_true", help="also train the final depth alone")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    chosen = recipe.override(
        recipe.load(options.recipe), epochs=options.epochs, strength=options.strength
    )
    rows = [run_seed(replace(chosen, seed=seed), options) for seed in options.seeds]
    result = {
        "recipe": chosen.as_dict(),
        **facts(options.device),
        "rows": rows,
        "mean": mean_of(rows),
    }
    print(markdown(result))
    if options.output is not None:
        write_result(options.output, result)


def run_seed(one: recipe.Recipe, options: argparse.Namespace) -> dict:
    """The figures of one seed's runs, by kind."""
    variants = {"dense": replace(one, prune=False), "pruned": one}
    row: dict = {"seed": one.seed}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("dense", "pruned", "control")[: 3 if options.control else 2]:
            print(f"seed {one.seed}, {kind}", flush=True)
            summary = train(
                variants[kind], options.data_dir, Path(folder, kind), device=options.device
            )
            row[kind] = {key: summary[key] for key in FIGURES}
            if kind == "pruned":
                gone = tuple(p["name"] for p in summary["architecture"] if not p["kept"])
                variants["control"] = replace(one, prune=False, without=gone)
    row["train_time_fraction"] = row["pruned"]["train_seconds"] / row["dense"]["train_seconds"]
    return row


def mean_of(rows: list[dict]) -> dict:
    """Means over seeds; accuracies also as paired differences to dense, with standard error."""
    result: dict = {"train_time_fraction": statistics.mean(r["train_time_fraction"] for r in rows)}
    for kind in (kind for kind in ("dense", "pruned", "control") if kind in rows[0]):
        averaged = ("accuracy", "sections_kept", "train_flops_fraction", "inference_flops_fraction")
        result[kind] = {key: statistics.mean(r[kind][key] for r in rows) for key in averaged}
        paired = [r[kind]["accuracy"] - r["dense"]["accuracy"] for r in rows]
        result[kind]["accuracy_difference"] = statistics.mean(paired)
        result[kind]["accuracy_difference_standard_error"] = (
            statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else None
        )
    return result


def markdown(result: dict) -> str:
    lines = [
        "| seed | run | accuracy | sections | training FLOPs | inference FLOPs | training time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for kind in (kind for kind in ("dense", "pruned", "control") if kind in row):
            one = row[kind]
            lines.append(
                f"| {row['seed']} | {kind} | {one['accuracy']:.4f} | {one['sections_kept']} | "
                f"{one['train_flops_fraction']:.1%} | {one['inference_flops_fraction']:.1%} | "
                f"{one['train_seconds']:.1f} s |"
            )
    for kind in (kind for kind in ("pruned", "control") if kind in result["mean"]):
        mean = result["mean"][kind]
        error = mean["accuracy_difference_standard_error"]
        within = "" if error is None else f" ± {100 * error:.2f}"
        time = statistics.mean(
            row[kind]["train_seconds"] / row["dense"]["train_seconds"] for row in result["rows"]
        )
        points = f"{100 * mean['accuracy_difference']:+.2f}{within} points"
        training, inference = mean["train_flops_fraction"], mean["inference_flops_fraction"]
        lines.append(
            f"| mean | {kind} | {mean['accuracy']:.4f} ({points}) | {mean['sections_kept']:.1f} | "
            f"{training:.1%} | {inference:.1%} | {time:.1%} of dense |"
        )
    return "\n".join([*lines, "", decisions([row["pruned"] for row in result["rows"]])])


def decisions(runs: list[dict]) -> str:
    """How the pruned runs' sections were decided, and what that took."""
    tested, rounded = (sum(r[f"decided_by_{how}"] for r in runs) for how in ("test", "rounding"))
    firsts = [r["first_elimination_fraction"] for r in runs]
    first = statistics.mean(f for f in firsts if f is not None) if any(firsts) else None
    when = "none left" if first is None else f"the first left after {first:.0%} of training"
    testing = sum(r["overhead"]["test_seconds"] for r in runs)
    share = testing / sum(r["train_seconds"] for r in runs)
    return (
        f"Of the pruned runs' sections the test decided {tested} of {tested + rounded}; {when}; "
        f"the tests took {share:.1%} of the time."
    )


if __name__ == "__main__":
    main()
