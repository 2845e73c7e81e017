"""Networks that a checkpoint can name, and be rebuilt from without the script that trained it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerprune import models
from layerprune.training.untrusted import what_failed

__all__ = ["Builder", "build_on_meta", "check_kwargs"]

Builder = Callable[[], nn.Module]
"""Builds the dense network of a checkpoint that names none."""

_TORCHVISION = "torchvision."
# Nothing that would fetch weights, or call what it is given.
_TORCHVISION_KWARGS = {
    "attention_dropout",
    "dropout",
    "groups",
    "image_size",
    "num_classes",
    "stochastic_depth_prob",
    "width_per_group",
    "zero_init_residual",
}
_GREATEST = 65536
_LONGEST = 100


def check_kwargs(name: Any, kwargs: Any) -> None:
    """Refuses what no builder takes: anything but plain numbers, words and truth values.

    Raises:
        ValueError: naming the argument.
    """
    if not (isinstance(name, str) and len(name) <= _LONGEST and isinstance(kwargs, Mapping)):
        raise ValueError("a builder is a name and a mapping of arguments")
    if len(kwargs) > _LONGEST:
        raise ValueError(f"a builder has no {len(kwargs)} arguments")
    for key, value in kwargs.items():
        if not (isinstance(key, str) and re.fullmatch(r"[a-z_][a-z0-9_]{0,99}", key)):
            raise ValueError("a builder's argument has an impossible name")
        if isinstance(value, str):
            fits = len(value) <= _LONGEST
        elif isinstance(value, float):
            fits = math.isfinite(value) and abs(value) <= _GREATEST
        else:
            fits = isinstance(value, int) and abs(value) <= _GREATEST
        if not fits:
            raise ValueError(f"the builder's argument {key} is beyond all bounds")


def build_on_meta(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A dense network by its name: of `layerprune.models`, or ``torchvision.NAME``.

    It is on the meta device: whatever its size, it takes no memory.

    Raises:
        ValueError: no such network, or it cannot be built so.
    """
    check_kwargs(name, kwargs)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            if not name.startswith(_TORCHVISION):
                return models.build(name, **kwargs)
            return _build_torchvision(name.removeprefix(_TORCHVISION), kwargs)
        except Exception as error:  # the arguments are foreign: there is no telling what fails
            raise ValueError(what_failed(error)) from error


def _build_torchvision(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    from torchvision import models as networks

    unknown = sorted(set(kwargs) - _TORCHVISION_KWARGS)
    if unknown:
        raise ValueError(
            f"{_TORCHVISION}{name} is not built with {', '.join(unknown)}: give a builder"
        )
    if name not in networks.list_models(module=networks):
        raise ValueError(f"unknown model {_TORCHVISION + name!r}")
    return networks.get_model(name, weights=None, **kwargs)
