"""``layerprune train``: the flags, and what is printed at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerprune.training import recipe
from layerprune.training.engine import train
from layerprune.training.runfolder import read_args
from layerprune.training.untrusted import parsed_yaml

__all__ = ["DataDir", "Device", "train_command"]

DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the data set.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: a GPU if any.")]


def train_command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe's name or a YAML file; see info."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; default: runs/RECIPE.")] = None,
    data_dir: DataDir = None,
    dataset: Annotated[str | None, typer.Option()] = None,
    model: Annotated[str | None, typer.Option()] = None,
    train_subset: Annotated[int | None, typer.Option(help="Train on so many images.")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward.")] = None,
    grad_accum_steps: Annotated[int | None, typer.Option(help="Forwards a step.")] = None,
    opt: Annotated[str | None, typer.Option(help="sgd, adam or adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    clip_grad: Annotated[
        float | None, typer.Option(help="Greatest norm of all gradients together.")
    ] = None,
    warmup_epochs: Annotated[
        float | None,
        typer.Option(help="Of the learning rate; theta's own is --set warm_up=SHARE."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Loss that a layer of mean cost must be worth.")
    ] = None,
    cost: Annotated[str | None, typer.Option(help="flops, params, uniform or latency.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that fetch data.")] = None,
    channels_last: Annotated[
        bool | None, typer.Option(help="Keep images and weights channels-last in memory.")
    ] = None,
    amp: Annotated[bool | None, typer.Option(help="Mixed precision.")] = None,
    amp_dtype: Annotated[str | None, typer.Option(help="bfloat16 or float16.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")
    ] = None,
    model_ema: Annotated[
        bool | None, typer.Option(help="Average the weights; saved beside the model.")
    ] = None,
    model_ema_decay: Annotated[float | None, typer.Option()] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Do not prune.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of PruneConfig; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output.")
    ] = False,
    device: Device = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Save every so many steps, beside the epochs' ends.")
    ] = None,
    checkpoint_hist: Annotated[int, typer.Option(min=1, help="Checkpoints to keep.")] = 2,
) -> None:
    """Train a network, pruning its depth meanwhile."""
    if resume and output is None:
        raise typer.BadParameter("--resume needs --output, the folder of the run to go on with")
    if resume and name is None:
        chosen, earlier = read_args(output)
        data_dir = data_dir or earlier
    else:
        chosen = recipe.load(name or recipe.DEFAULT)
    chosen = recipe.override(
        chosen,
        dataset=dataset,
        model=model,
        train_subset=train_subset,
        epochs=epochs,
        batch_size=batch_size,
        grad_accum_steps=grad_accum_steps,
        opt=opt,
        lr=lr,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        warmup_epochs=warmup_epochs,
        strength=strength,
        cost=cost,
        seed=seed,
        workers=workers,
        channels_last=channels_last,
        amp=amp,
        amp_dtype=amp_dtype,
        compile=compiled,
        model_ema=model_ema,
        model_ema_decay=model_ema_decay,
        checkpoint_steps=checkpoint_steps,
        prune=False if dense else None,
        prune_config=chosen.prune_config | _assignments(settings or []),
    )
    output = output or Path("runs", chosen.name)
    summary = train(
        chosen,
        data_dir,
        output,
        resume=resume,
        device=device,
        checkpoint_hist=checkpoint_hist,
    )
    if not summary:  # another rank has it
        return
    if chosen.prune:
        print(
            f"accuracy {summary['accuracy']:.4f} with {summary['sections_kept']} of "
            f"{summary['sections_total']} sections, for {summary['train_flops_fraction']:.1%} of "
            f"the dense training FLOPs; inference {summary['inference_flops_fraction']:.1%}"
        )
    else:
        print(f"accuracy {summary['accuracy']:.4f}")
    print(f"report: {output / 'report.html'}")


def _assignments(settings: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs, the values read as YAML."""
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise recipe.RecipeError(f"--set takes KEY=VALUE, got {setting!r}")
        try:
            values[key.strip()] = parsed_yaml(text)
        except ValueError as error:
            raise recipe.RecipeError(f"--set {setting!r}: the value is no YAML") from error
    return values
