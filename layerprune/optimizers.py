"""Optimizers whose parameters leave them: which can be served, and what they forget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_REFUSED_OPTIMIZERS = (torch.optim.LBFGS, torch.optim.SparseAdam)


def step_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None,
    accumulation: int,
    skipped: bool,
) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers of a step, whose arguments are those of `LayerPruner.step`.

    Raises:
        TypeError: if there is none, or the scaler is none.
        RuntimeError: if the scaler has not stepped them, or was updated since.
        ValueError: if accumulation is not a whole number of at least 1.
    """
    optimizers = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    if not optimizers:
        raise TypeError("optimizer is an empty list: give all that hold parameters")
    if not (isinstance(accumulation, int) and accumulation >= 1):
        raise ValueError(f"accumulation must be a whole number >= 1, got {accumulation!r}")
    if not (scaler is None or isinstance(scaler, torch.amp.GradScaler)):
        raise TypeError(f"scaler must be a GradScaler or None, got {type(scaler).__name__}")
    if scaler is not None and scaler.is_enabled() and not skipped:
        if not all(map(scaler._found_inf_per_device, optimizers)):
            raise RuntimeError(
                "with a scaler, call the pruner's step after scaler.step(optimizer) and "
                "before scaler.update()"
            )
    return optimizers


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that compaction could not serve.

    Raises:
        TypeError: for LBFGS and SparseAdam, for those of ``torch.distributed``, for one that wraps
            another and keeps groups or state of its own, and for what is no optimizer.
        ValueError: if the optimizer holds none of the model's parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, _REFUSED_OPTIMIZERS):
        raise TypeError(
            f"{type(optimizer).__name__} keeps state that cannot be split by parameter; "
            "use SGD, Adam, AdamW or another optimizer of torch.optim"
        )
    if any(kind.__module__.startswith("torch.distributed.") for kind in type(optimizer).__mro__):
        raise TypeError(
            f"{type(optimizer).__name__} spreads its state over ranks or averages by itself, which "
            "compaction does not reach: use an optimizer of torch.optim on every rank"
        )
    for inner in tree_leaves(vars(optimizer)):
        if isinstance(inner, torch.optim.Optimizer) and not (
            inner.state is optimizer.state and inner.param_groups is optimizer.param_groups
        ):
            raise TypeError(
                f"{type(optimizer).__name__} wraps {type(inner).__name__} and keeps parameter "
                "groups or state apart from it, which compaction does not reach: use "
                f"{type(inner).__name__} itself"
            )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            "the optimizer holds none of the model's parameters: make it from the "
            "parameters of the very model that the pruner was given"
        )


def forget(optimizer: torch.optim.Optimizer, gone: set[int]) -> None:
    """Takes parameters, given by their ids, out of an optimizer's groups and its state."""
    for group in optimizer.param_groups:
        stays = [id(parameter) not in gone for parameter in group["params"]]
        for parameter, stay in zip(group["params"], stays, strict=True):
            if not stay:
                optimizer.state.pop(parameter, None)
        # Groups made from `named_parameters()` list the names alongside.
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = compress(group[key], stays)
