"""Recipes: everything that decides how a run goes, as a typed record that comes from YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from layerprune import models
from layerprune.config import PruneConfig
from layerprune.training import data
from layerprune.training.typed import coerced
from layerprune.training.untrusted import YAML_LIMIT, parsed_yaml, read_text

__all__ = ["DEFAULT", "Recipe", "RecipeError", "from_mapping", "load", "names", "override"]

DEFAULT = "digits-resnet32"
"""The recipe that needs no download."""


class RecipeError(ValueError):
    """A recipe is unknown or holds something it may not; the message says what and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run; names as in timm's training script where it has them.

    Attributes:
        name: the recipe's name.
        dataset: one of `layerprune.training.data.NAMES`.
        model: one of `layerprune.models.names()`.
        model_args: further arguments of the model; classes, channels and size are the data's.
        train_subset: train on this many images only; None for all.
        epochs: passes over the training images.
        batch_size: images a step; a smaller last batch is left out.
        opt: the optimizer.
        lr: learning rate after its warm-up.
        momentum: of sgd.
        nesterov: whether sgd's momentum is Nesterov's.
        weight_decay: of all parameters.
        sched: how the learning rate goes on after its warm-up; each step has its own.
        warmup_epochs: epochs in which the learning rate rises linearly. Theta's warm-up is
            ``prune_config: {warm_up: ...}``.
        decay_milestones: epochs at which ``multistep`` lowers the rate.
        decay_rate: what ``multistep`` multiplies it by.
        smoothing: label smoothing.
        augment: whether training images are augmented as is usual for the data set.
        prune: False trains the dense network, with plain PyTorch.
        strength: the loss that a section of mean cost must be worth.
        cost: by what a section's penalty is set.
        prune_config: fields of `layerprune.PruneConfig`.
        without: names of sections that are removed before training starts (a control of given
            depth); only with ``prune: false``.
        seed: of the weights, the batches and the gates.
        workers: processes that fetch data; changes no result.
        channels_last: whether images and weights are kept channels-last in memory.
    """

    name: str
    dataset: str
    model: str
    epochs: int
    batch_size: int
    lr: float
    model_args: dict[str, Any] = field(default_factory=dict)
    train_subset: int | None = None
    opt: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    sched: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    decay_milestones: tuple[float, ...] = ()
    decay_rate: float = 0.1
    smoothing: float = 0.0
    augment: bool = True
    prune: bool = True
    strength: float = 0.02
    cost: Literal["flops", "params", "uniform"] = "flops"
    prune_config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    seed: int = 0
    workers: int = 0
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in data.NAMES:
            raise RecipeError(
                f"unknown data set {self.dataset!r}; the data sets are {', '.join(data.NAMES)}"
            )
        if self.model not in models.names():
            raise RecipeError(
                f"unknown model {self.model!r}; the models are {', '.join(models.names())}"
            )
        fixed = {"num_classes", "in_channels", "image_size"} & set(self.model_args)
        if fixed:
            raise RecipeError(f"model_args may not set {', '.join(sorted(fixed))}: the data does")
        least = {"epochs": 1, "batch_size": 1, "seed": 0, "workers": 0, "warmup_epochs": 0}
        least |= {"weight_decay": 0, "momentum": 0}
        for name, minimum in least.items():
            if not minimum <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.train_subset is not None and self.train_subset < self.batch_size:
            raise RecipeError(
                f"train_subset ({self.train_subset}) leaves no batch of batch_size "
                f"{self.batch_size}: choose a smaller batch_size"
            )
        above = {"lr": self.lr, "decay_rate": self.decay_rate}
        above |= {"strength": self.strength} if self.prune else {}
        for name, value in above.items():
            if not 0 < value < math.inf:
                raise RecipeError(f"{name} must be above 0, got {value}")
        if not 0 <= self.smoothing < 1:
            raise RecipeError(f"smoothing must lie in [0, 1), got {self.smoothing}")
        if self.nesterov and self.momentum == 0:
            raise RecipeError("nesterov needs a momentum above 0, got 0")
        if self.warmup_epochs > self.epochs:
            raise RecipeError(
                f"warmup_epochs must be at most epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if self.prune and self.without:
            raise RecipeError("without is for a control of given depth: it needs prune: false")
        try:
            given = coerced(PruneConfig, self.prune_config, "prune_config")
            object.__setattr__(self, "prune_config", given)  # a frozen record's own way to do it
            config = self.pruning()
        except ValueError as error:
            raise RecipeError(str(error)) from error
        if self.prune and self.batch_size < config.min_rows:
            raise RecipeError(
                f"batch_size must be at least min_rows ({config.min_rows}), the rows on which a "
                f"branch always runs; got {self.batch_size}"
            )

    def pruning(self) -> PruneConfig:
        """The pruner's settings."""
        return PruneConfig(**self.prune_config)

    def as_dict(self) -> dict[str, Any]:
        """The settings as YAML holds them."""
        values = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if _is_recipe(entry.name))


def load(name: str) -> Recipe:
    """Reads a recipe.

    Args:
        name: one of `names()`, or the path of a YAML file (it ends in .yaml or .yml, or holds a
            slash). A file without ``name`` is named after itself.

    Raises:
        RecipeError: no such recipe, or it holds something it may not.
    """
    if _is_recipe(name) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"no such recipe file: {path}")
        try:
            text, what = read_text(path, YAML_LIMIT), str(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe file {path} cannot be read: {error}") from error
    elif name in names():
        text, what = _folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8"), name
    else:
        raise RecipeError(
            f"unknown recipe {name!r}; the recipes are {', '.join(names())} "
            "(or give the path of a .yaml file)"
        )
    try:
        values = parsed_yaml(text)
    except ValueError as error:
        raise RecipeError(f"recipe {what} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {what} must be a mapping of settings")
    return from_mapping({"name": Path(what).stem if _is_recipe(what) else what} | values, what)


def from_mapping(values: Mapping[str, Any], what: str) -> Recipe:
    """Makes a recipe of plain values.

    Args:
        values: by setting.
        what: where they come from, for the message.

    Raises:
        RecipeError: an unknown or missing setting, a wrong type, a value out of its range.
    """
    needed = ("name", "dataset", "model", "epochs", "batch_size", "lr")
    missing = [name for name in needed if name not in values]
    if missing:
        raise RecipeError(f"recipe {what} lacks {', '.join(missing)}")
    try:
        return Recipe(**coerced(Recipe, values, f"recipe {what}"))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def override(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with some settings replaced; those given as None stay.

    Raises:
        RecipeError: as `from_mapping`.
    """
    given = {key: value for key, value in values.items() if value is not None}
    try:
        return replace(recipe, **coerced(Recipe, given, f"recipe {recipe.name}"))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _folder() -> Any:
    return resources.files("layerprune").joinpath("recipes")


def _is_recipe(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))
