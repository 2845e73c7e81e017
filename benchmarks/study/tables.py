"""A study's results as tables in markdown: a block of docs/performance.md each."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, median

from markdown_table import Column, figures, of, table

from study import worth
from study.grid import EPOCHS, REFERENCE
from study.statistics import Comparison, Group, Runs, groups, mean, paired, ratio, select, spread
from study.targets import targets

PRUNING = (REFERENCE, "taylor", "simultaneous")
"""Methods whose sections leave while they train."""
JUDGED = (REFERENCE, "dense", "scratch", "random")
"""Methods of whose sections it is asked what they are worth: the reference's, and controls."""
NOTHING = "No run of these is there yet."


def accuracy(runs: Runs) -> str:
    """The mean in percent and, of several seeds, their standard deviation."""
    deviation = spread(runs, "accuracy")
    return f"{100 * mean(runs, 'accuracy'):.2f}" + (
        "" if deviation is None else f" ± {100 * deviation:.2f}"
    )


def points(found: Comparison | None) -> str:
    """A difference of accuracies and, of several seeds, its interval."""
    if found is None:
        return ""
    if found.seeds == 1:
        return f"{100 * found.mean:+.2f}"
    return f"{100 * found.mean:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"


def counts(runs: Runs, key: str = "sections_kept") -> str:
    """The mean of a count and its range, where there is one."""
    found = [row[key] for row in runs.values()]
    low, high = min(found), max(found)
    return f"{fmean(found):.1f}" + (f" ({low}-{high})" if low < high else "")


def share(value: float | None) -> str:
    """A fraction in percent."""
    return "" if value is None else f"{value:.1%}"


def title(result: dict, task: str) -> str:
    """What a task is, in a line."""
    recipe = result["tasks"][task]["recipe"]
    images = recipe.get("train_subset")
    return (
        f"**{task}**: {recipe['model']} on {f'{images:,}' if images else 'the'} images of "
        f"{recipe['dataset']}, {recipe['epochs']} epochs, strength {recipe['strength']:g}."
    )


def methods(result: dict) -> str:
    """Per task, every method against the reference and against the dense network."""
    parts = []
    for task in result["tasks"]:
        found = groups(result["rows"], task)
        if found:
            rows = [{"group": group} for group in found]
            planned = len(result["tasks"][task]["seeds"])
            parts += [title(result, task), table(_method_columns(found, planned), rows)]
    return "\n\n".join(parts) or NOTHING


def _method_columns(found: list[Group], planned: int) -> dict[str, Column]:
    def seeds(row: dict) -> str:
        count = len(row["group"].runs)
        return str(count) if count == planned else f"{count} of {planned}"

    def against(method: str) -> Runs:
        runs = [g.runs for g in found if (g.method, g.budget) == (method, EPOCHS)]
        return runs[0] if runs else {}

    def name(group: Group) -> str:
        text = f"`{group.method}`{group.label.removeprefix(group.method)}"
        return f"**{text}**" if group.method == REFERENCE else text

    def difference(other: str) -> Column:
        return lambda row: (
            ""
            if (row["group"].method, row["group"].budget) == (other, EPOCHS)
            else points(paired(row["group"].runs, against(other)))
        )

    dense = against("dense")
    return {
        "method": lambda row: name(row["group"]),
        "seeds": seeds,
        "accuracy": lambda row: accuracy(row["group"].runs),
        "less `ours`": difference(REFERENCE),
        "less `dense`": difference("dense"),
        "sections": lambda row: counts(row["group"].runs),
        "training FLOPs": lambda row: share(mean(row["group"].runs, "train_flops")),
        "training time": lambda row: share(ratio(row["group"].runs, dense, "train_seconds")),
        "inference FLOPs": lambda row: share(mean(row["group"].runs, "inference_flops")),
        "inference time": lambda row: share(ratio(row["group"].runs, dense, "inference_seconds")),
    }


def summary(result: dict) -> str:
    """A row per task: what the reference saves of the dense network's bill."""
    rows = []
    for task in result["tasks"]:
        ours, dense = (select(result["rows"], task, name) for name in (REFERENCE, "dense"))
        if ours:
            rows.append({"task": task, "ours": ours, "dense": dense})
    columns = {
        "task": of("task", "{}"),
        "seeds": lambda row: str(len(row["ours"])),
        "dense": lambda row: accuracy(row["dense"]) if row["dense"] else "",
        "pruned while training": lambda row: accuracy(row["ours"]),
        "difference, points": lambda row: points(paired(row["ours"], row["dense"])),
        "sections": lambda row: (
            f"{counts(row['ours'])} of {next(iter(row['ours'].values()))['sections']}"
        ),
        "training FLOPs": lambda row: share(mean(row["ours"], "train_flops")),
        "training time": lambda row: share(ratio(row["ours"], row["dense"], "train_seconds")),
        "inference FLOPs": lambda row: share(mean(row["ours"], "inference_flops")),
        "inference time": lambda row: share(ratio(row["ours"], row["dense"], "inference_seconds")),
    }
    return table(columns, rows) if rows else NOTHING


def variations(result: dict) -> str:
    """Per task that has some, the reference under other settings, on the seeds of these."""
    columns = {
        "setting": of("setting", "{}"),
        "seeds": lambda row: str(len(row["runs"])),
        "accuracy": lambda row: accuracy(row["runs"]),
        "less the task's own": lambda row: (
            points(paired(row["runs"], row["own"])) if row["runs"] is not row["own"] else ""
        ),
        "held-out loss": lambda row: (
            f"{mean(row['runs'], 'held_out_loss'):.4f} ± {spread(row['runs'], 'held_out_loss'):.4f}"
            if len(row["runs"]) > 1
            else f"{mean(row['runs'], 'held_out_loss'):.4f}"
        ),
        "sections at the start": lambda row: counts(row["runs"], "sections"),
        "sections kept": lambda row: counts(row["runs"]),
        "training FLOPs": lambda row: share(mean(row["runs"], "train_flops")),
    }
    parts = []
    for task, changes in result["variations"].items():
        varied = {name: select(result["rows"], task, REFERENCE, name) for name in changes}
        seeds = set().union(*varied.values())
        own = select(result["rows"], task, REFERENCE)
        own = {seed: row for seed, row in own.items() if seed in seeds}
        rows = [
            {"setting": name or "as the task is", "runs": runs, "own": own}
            for name, runs in ({"": own} | varied).items()
            if runs
        ]
        if rows:
            parts += [title(result, task), table(columns, rows)]
    return "\n\n".join(parts) or NOTHING


def eliminations(result: dict) -> str:
    """When sections leave, what decided, and what deciding costs, by estimator."""

    def total(key: str) -> Column:
        return lambda row: str(sum(run[key] for run in row["runs"].values()))

    def when(choose: Callable[[list[float]], float]) -> Column:
        return lambda row: share(choose(row["times"])) if row["times"] else ""

    def part(key: str, whole: str) -> Column:
        return lambda row: share(fmean(run[key] / run[whole] for run in row["runs"].values()))

    columns = {
        "task": of("task", "{}"),
        "method": of("method", "`{}`"),
        "seeds": lambda row: str(len(row["runs"])),
        "left": lambda row: str(len(row["times"])),
        "first": when(min),
        "median": when(median),
        "last": when(max),
        "decided by test": total("decided_by_test"),
        "by rounding": total("decided_by_rounding"),
        "thetas between 0 and 1": total("thetas_between"),
        "tests, of the FLOPs": part("test_flops", "train_flops"),
        "pruner, of the time": part("overhead_seconds", "train_seconds"),
    }
    rows = []
    for task in result["tasks"]:
        for method in PRUNING:
            runs = select(result["rows"], task, method)
            times = [time for run in runs.values() for time, *_ in run["eliminations"]]
            if runs:
                rows.append({"task": task, "method": method, "runs": runs, "times": times})
    return table(columns, rows) if rows else NOTHING


def optimality(result: dict) -> str:
    """Whether the sections that networks have at the end are worth their penalty."""

    def largest(row: dict) -> str:
        found = max(row["left"], key=lambda section: section.excess)
        return f"{found.excess:+.4f} ± {found.error:.4f}"

    columns = {
        "task": of("task", "{}"),
        "method": of("method", "`{}`"),
        "sections": lambda row: str(len(row["left"])),
        "Delta <= -nu": lambda row: str(sum(section.pays for section in row["left"])),
        "no, within two standard errors": lambda row: str(
            sum(not (section.pays or section.surely_fails) for section in row["left"])
        ),
        "no, beyond": lambda row: str(sum(section.surely_fails for section in row["left"])),
        "largest Delta + nu": largest,
    }
    rows = [
        {"task": task, "method": method, "left": left}
        for task in result["tasks"]
        for method in JUDGED
        if (left := worth.left(result["rows"], task, method))
    ]
    return table(columns, rows) if rows else NOTHING


def reinsertions(result: dict) -> str:
    """Whether sections that are put in with fresh weights come to be worth their penalty."""

    def would_pay(row: dict) -> str:
        if row["back"].surely_pays:
            return "**yes**"
        return "no" if row["back"].surely_fails else "undecided"

    columns = {
        "task": of("task", "{}"),
        "section": lambda row: f"`{row['back'].section}`",
        "was": of("was", "{}"),
        "Delta": lambda row: f"{row['back'].difference:+.4f} ± {row['back'].error:.4f}",
        "-nu": lambda row: f"{-row['back'].penalty:+.4f}",
        "would pay": would_pay,
    }
    rows = [
        {"task": task, "back": back, "was": was}
        for task in result["tasks"]
        for was in ("eliminated", "kept")
        for back in worth.put_in(result["rows"], task, was == "kept")
    ]
    if not rows:
        return NOTHING
    told = []
    for was in ("eliminated", "kept"):
        answers = [would_pay(row).strip("*") for row in rows if row["was"] == was]
        found = ", ".join(f"{answers.count(a)} {a}" for a in ("yes", "undecided", "no"))
        told.append(f"of {len(answers)} {was} ones: {found}")
    return f"Would it pay? {'; '.join(told).capitalize()}.\n\n{table(columns, rows)}"


def held_to(result: dict) -> str:
    """The figures that the study is held to."""
    found = targets(result)
    return figures(found) if found else NOTHING


BLOCKS = {
    "summary": summary,
    "methods": methods,
    "variations": variations,
    "eliminations": eliminations,
    "optimality": optimality,
    "reinsertions": reinsertions,
    "targets": held_to,
}
"""By what follows the study's name in a block's."""
