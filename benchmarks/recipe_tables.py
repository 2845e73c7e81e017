"""The tables of docs/recipes.md, and what a recipe's file says of its costs."""

from __future__ import annotations

from markdown_table import of, table

FOLDERS = {
    "digits": "none",
    "mnist": "[IDX](#data)",
    "fashion-mnist": "[IDX](#data)",
    "cifar10": "[batches](#data)",
    "imagefolder": "[folders](#data)",
}


def recipe_counts(result: dict) -> str:
    columns = {
        "recipe": of("recipe", "`{}`"),
        "network": network,
        "sections": of("sections", "{}"),
        "parameters": of("parameters", "{:,}"),
        "data": of("dataset", "{}"),
        "`--data-dir`": lambda row: FOLDERS[row["dataset"]],
        "images": lambda row: f"{row['train_images']:,} + {row['test_images']:,}",
        "epochs": of("epochs", "{}"),
        "batch": of("batch_size", "{}"),
        "FLOPs an image": lambda row: flops(row["forward_flops"]),
        "dense training FLOPs": lambda row: flops(row["dense_train_flops"]),
    }
    return table(columns, result["rows"])


def recipe_steps(result: dict) -> str:
    columns = {
        "recipe": of("recipe", "`{}`"),
        "images a step": measured_images,
        "dense": lambda row: seconds(row["dense"]["cpu_seconds"]),
        "pruned, at its start": lambda row: seconds(row["pruned"]["cpu_seconds"]),
        "dense run": lambda row: duration(dense_seconds(row)),
        "memory": memory,
    }
    return table(columns, result["rows"])


def loading_rates(result: dict) -> str:
    columns = {
        "workers": of("workers", "{}"),
        "images/s": of("images_per_second", "{:.0f}"),
        "CPU ms an image": of("cpu_ms", "{:.1f}"),
        "images/s of a core": lambda row: f"{1e3 / row['cpu_ms']:.0f}",
        "start of the processes": lambda row: f"{row['start_seconds']:.2f} s",
    }
    return table(columns, result["rows"])


def loading_parts(result: dict) -> str:
    return table({"part": of("part", "{}"), "CPU ms": of("cpu_ms", "{:.1f}")}, result["parts"])


def costs(row: dict) -> str:
    """The line of a recipe's file that says what it costs."""
    dense = flops(row["dense_train_flops"])
    told = f"# Costs (docs/recipes.md): {dense} FLOPs dense, {row['total_steps']:,} steps"
    a_step = seconds(row["dense"]["cpu_seconds"])
    if whole(row):
        return f"{told}; on a CPU {a_step} a step and {gigabytes(run_bytes(row))} of memory."
    cut = f"{a_step} for {row['measured_batch']} images"
    return f"{told}; on a CPU {cut} and about {gigabytes(run_bytes(row))} for {row['batch_size']}."


def network(row: dict) -> str:
    arguments = ", ".join(f"{name} {value}" for name, value in row["model_args"].items())
    return row["model"] + (f", {arguments}" if arguments else "")


def flops(count: float) -> str:
    return f"{count:.2e}".replace("e+0", "e").replace("e+", "e")


def whole(row: dict) -> bool:
    """Whether the recipe's own batch was measured."""
    return row["measured_batch"] == row["batch_size"]


def measured_images(row: dict) -> str:
    return f"{row['measured_batch']}" + ("" if whole(row) else f" of {row['batch_size']}")


def dense_seconds(row: dict) -> float:
    """Of a core for the dense run's steps."""
    steps = row["total_steps"] * row["batch_size"] / row["measured_batch"]
    return steps * row["dense"]["cpu_seconds"]


def most_bytes(row: dict) -> float:
    """Of a process at the measured batch, dense or pruned."""
    return max(row[kind]["peak_bytes"] for kind in ("dense", "pruned"))


def run_bytes(row: dict) -> float:
    """Of a process at the recipe's batch, dense or pruned."""
    if whole(row):
        return most_bytes(row)
    told = []
    for kind in ("dense", "pruned"):
        most = row[kind]["peak_bytes"]
        images = row["measured_batch"] - row["measured_batch"] // 2
        an_image = (most - row[kind]["half_batch"]["peak_bytes"]) / images
        told.append(most + an_image * (row["batch_size"] - row["measured_batch"]))
    return max(told)


def memory(row: dict) -> str:
    most = gigabytes(most_bytes(row))
    if whole(row):
        return most
    return f"{most}, so about {gigabytes(run_bytes(row))} for {row['batch_size']} images"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


def seconds(count: float) -> str:
    return f"{count:.1f} s" if count >= 1 else f"{count:.2g} s"


def duration(count: float) -> str:
    """In the largest unit of which there is more than one."""
    for name, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if count > length:
            return f"{count / length:.1f} {name}"
    return seconds(count)
