"""The settings of a run as a typed record, each checked against the others."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from layerprune import models
from layerprune.config import PruneConfig
from layerprune.training import data
from layerprune.training.typed import coerced

__all__ = ["Recipe", "RecipeError"]


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
        batch_size: images a forward, over all ranks.
        grad_accum_steps: forwards a step; images that do not fill the last step are left out.
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
        clip_grad: greatest norm of all gradients together; None for no bound.
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
        amp: whether forwards run in ``amp_dtype`` where autocast finds it safe.
        amp_dtype: with ``float16`` a gradient scaler goes along.
        compile: whether the model is compiled by ``torch.compile``.
        model_ema: whether an exponential moving average of the weights is kept, evaluated and
            saved beside the model.
        model_ema_decay: the share of it that a step leaves as it was.
        checkpoint_steps: write a checkpoint every so many steps beside those at the epochs' ends;
            changes no result.
    """

    name: str
    dataset: str
    model: str
    epochs: int
    batch_size: int
    lr: float
    grad_accum_steps: int = 1
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
    clip_grad: float | None = None
    smoothing: float = 0.0
    augment: bool = True
    prune: bool = True
    strength: float = 0.02
    cost: Literal["flops", "params", "uniform", "latency"] = "flops"
    prune_config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    seed: int = 0
    workers: int = 0
    channels_last: bool = False
    amp: bool = False
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    compile: bool = False
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    checkpoint_steps: int | None = None

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
        least |= {"weight_decay": 0, "momentum": 0, "grad_accum_steps": 1}
        least |= {} if self.checkpoint_steps is None else {"checkpoint_steps": 1}
        for name, minimum in least.items():
            if not minimum <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise RecipeError(f"seed must be below 2**63, got {self.seed}")
        if self.train_subset is not None and self.train_subset < self.step_rows:
            times = f" times {self.grad_accum_steps}" if self.grad_accum_steps > 1 else ""
            raise RecipeError(
                f"train_subset ({self.train_subset}) leaves no batch of batch_size "
                f"{self.batch_size}{times}: choose a smaller batch_size"
            )
        above = {"lr": self.lr, "decay_rate": self.decay_rate}
        above |= {"strength": self.strength} if self.prune else {}
        above |= {} if self.clip_grad is None else {"clip_grad": self.clip_grad}
        for name, value in above.items():
            if not 0 < value < math.inf:
                raise RecipeError(f"{name} must be above 0, got {value}")
        if not 0 <= self.smoothing < 1:
            raise RecipeError(f"smoothing must lie in [0, 1), got {self.smoothing}")
        if not 0 <= self.model_ema_decay < 1:
            raise RecipeError(f"model_ema_decay must lie in [0, 1), got {self.model_ema_decay}")
        if self.nesterov and self.momentum == 0:
            raise RecipeError("nesterov needs a momentum above 0, got 0")
        if self.warmup_epochs > self.epochs:
            raise RecipeError(
                f"warmup_epochs must be at most epochs ({self.epochs}), got {self.warmup_epochs}: "
                "set both for a shorter run (--warmup-epochs)"
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

    @property
    def step_rows(self) -> int:
        """Images a step."""
        return self.batch_size * self.grad_accum_steps

    def pruning(self) -> PruneConfig:
        """The pruner's settings."""
        return PruneConfig(**self.prune_config)

    def as_dict(self) -> dict[str, Any]:
        """The settings as YAML holds them."""
        values = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
