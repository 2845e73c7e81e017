"""The commands of ``layerprune``: what each one takes, runs and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from layerprune import backends, models
from layerprune.ranks import FirstRankFailed
from layerprune.train_command import DataDir, Device, train_command
from layerprune.training import data, demo, recipe
from layerprune.training.assembly import pick_device
from layerprune.training.checkpoint import absent, load_model, save
from layerprune.training.evaluation import evaluate
from layerprune.training.export import ExportError, check_absent, export
from layerprune.training.inspection import checked, data_of, imported, random_batches
from layerprune.training.interrupt import Interrupted
from layerprune.training.loop import TrainingDiverged
from layerprune.training.outcome import versions
from layerprune.training.report import write_report
from layerprune.training.runfolder import (
    CheckpointError,
    RunFolderError,
    locate,
)

__all__ = ["FAILURES", "MISTAKES", "Interrupted", "app"]

MISTAKES = (recipe.RecipeError, data.DataError, RunFolderError, CheckpointError, OSError)
"""What the user can set right."""
FAILURES = (ExportError, FirstRankFailed, TrainingDiverged)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train residual networks that find out which of their layers to drop.",
)

BuilderName = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Returns the dense network; for a checkpoint that names no builder.",
    ),
]

app.command("train")(train_command)


@app.command("eval")
def eval_command(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_RUN")],
    data_dir: DataDir = None,
    device: Device = None,
) -> None:
    """Measure a network on the test images."""
    folder = locate(path)
    model, structure = load_model(folder)
    splits = data_of(folder, structure, data_dir)
    where = pick_device(device)
    loss, accuracy = evaluate(model.to(where), splits, where)
    print(f"accuracy {accuracy:.4f}  loss {loss:.4f}  ({len(splits.test)} images)")


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_RUN")],
    data_dir: DataDir = None,
    device: Device = None,
    builder: BuilderName = None,
) -> None:
    """Compare a compacted network with the gated one, output for output."""
    found = checked(
        path,
        data_dir,
        pick_device(device),
        None if builder is None else imported(builder),
    )
    if found.without_data:
        print(f"{found.without_data}: random inputs of the stored shapes instead")
    print(f"largest difference over {found.inputs}: {found.difference:g}")
    if found.difference != 0:
        raise typer.Exit(1)


@app.command("export")
def export_command(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_RUN")],
    format: Annotated[Literal["safetensors", "torch", "onnx"], typer.Option()],
    output: Annotated[Path, typer.Option(help="A file; for safetensors a folder.")],
    batch: Annotated[
        str, typer.Option(metavar="N|dynamic", help="Rows of a call of the exported network.")
    ] = "dynamic",
    builder: BuilderName = None,
) -> None:
    """Write a plain network: weights and structure, a torch.export program, or ONNX."""
    if batch != "dynamic" and not (batch.isascii() and batch.isdigit() and int(batch) >= 1):
        raise typer.BadParameter(f"--batch takes a number of rows or dynamic, got {batch!r}")
    folder = locate(path)
    model, structure = load_model(folder, None if builder is None else imported(builder))
    if format == "safetensors":
        if batch != "dynamic":
            raise typer.BadParameter("--batch is for programs: safetensors hold weights alone")
        check_absent(output)
        save(output, model.state_dict(), structure | {"eliminated": absent(structure)})
    else:
        rows = None if batch == "dynamic" else int(batch)
        inputs = next(random_batches(folder, structure))
        difference = export(model, inputs, output, format, rows)
        print(f"largest difference from the module on random inputs: {difference:g}")
    print(output)


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    baseline: Annotated[Path | None, typer.Option(help="A dense run to compare with.")] = None,
) -> None:
    """Write a run's report.html anew, finished or not."""
    try:
        print(write_report(run, baseline))
    except ValueError as error:
        raise RunFolderError(str(error)) from error


@app.command("info")
def info_command() -> None:
    """Print versions, backends, devices, recipes, models and data sets."""
    for name, version in versions().items():
        print(f"{name:<11} {version}")
    for device, backend in backends().items():
        print(f"{device + ' ops':<11} {backend}")
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    print(f"{'devices':<11} {', '.join([*gpus, f'cpu ({torch.get_num_threads()} threads)'])}")
    print(f"{'recipes':<11} {', '.join(recipe.names())}")
    print(f"{'models':<11} {', '.join(models.names())}")
    print(f"{'data sets':<11} {', '.join(data.NAMES)}")


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option()] = Path("runs/demo"),
    name: Annotated[str, typer.Option("--recipe")] = recipe.DEFAULT,
    seed: Annotated[int | None, typer.Option()] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    data_dir: DataDir = None,
    device: Device = None,
) -> None:
    """Train the same network twice, dense and pruned, and compare the two."""
    chosen = recipe.override(recipe.load(name), seed=seed, epochs=epochs)
    result = demo.run(chosen, data_dir, output, device=device)
    print(f"\n{result.table}\n")
    print(f"report: {result.report}")
