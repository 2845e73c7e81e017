"""Whether a model is still the one that it was, and how it becomes that again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from layerprune.caches import SET_HERE
from layerprune.calls import Inputs
from layerprune.depth import configurations
from layerprune.dry_run import DryRuns
from layerprune.sections.removal import children_of, put_back


def evaluated(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What a model computes in evaluation mode, as a real forward has it.

    Raises:
        ValueError: if that holds no finite number to compare.
        Exception: what the model raises.
    """
    output = tree_leaves(DryRuns(model, inputs, real=True).run())
    tensors = [leaf for leaf in output if isinstance(leaf, Tensor)]
    if not any(tensor.isfinite().any() for tensor in tensors):
        raise ValueError("no finite number is in a tensor that it returns")
    return tensors


def are_alike(before: list[Tensor], again: list[Tensor], after: list[Tensor]) -> bool:
    """Whether a model computes what it did.

    Args:
        before: what it computed.
        again: the same once more: where it is not equal, the model's operations are not
            deterministic, and nothing that it computes ever is.
        after: what it computes now.
    """
    if [each.shape for each in before] != [each.shape for each in after]:
        return False
    exactly = all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    same = torch.equal if exactly else torch.allclose
    return all(same(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


@contextmanager
def undone_by_errors(model: nn.Module) -> Iterator[None]:
    """Puts a model's children, their numbers and its configurations back if there is an error."""
    modules = list(model.modules())
    children = children_of(model)
    numbers = [(m, {name: vars(m)[name] for name in SET_HERE if name in vars(m)}) for m in modules]
    told = [
        (c, {k: copy.copy(v) if type(v) in (list, dict) else v for k, v in vars(c).items()})
        for c in configurations(model)
    ]
    try:
        yield
    except BaseException:
        put_back(children)
        for holder, values in [*numbers, *told]:
            vars(holder).update(values)
        raise
