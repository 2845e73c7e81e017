"""Sections leave a model: what is left of their modules is put into the modules' places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn

from layerprune.sections.base import Section
from layerprune.sections.placeholders import PassThrough

Swapped = list[tuple[nn.Module, nn.Module]]
"""Modules that left, and what is in the place of each, in the order in which it was put there."""
Children = list[tuple[nn.Module, dict[str, nn.Module | None]]]
"""Modules, and the children of each by name."""


def remove(
    model: nn.Module, sections: Sequence[Section], nonnegative: Callable[[nn.Module], bool]
) -> Swapped:
    """Takes sections out of a model, but for the blocks around them: see `remove_emptied`.

    Args:
        model: changed in place.
        sections: of that model.
        nonnegative: whether a module's input is known to hold no negative value.
    """
    swapped = []
    for section in sections:
        swapped += _put_all(model, section.remainders(nonnegative(section.module)))
    return swapped


def remove_emptied(model: nn.Module, sections: Sequence[Section]) -> Swapped:
    """Takes blocks out of a model that do nothing now that sections are gone."""
    swapped = []
    for section in sections:
        swapped += _put_all(model, section.emptied())
    return swapped


def children_of(model: nn.Module) -> Children:
    """All that `put_back` needs."""
    # Those of a ScriptModule cannot be replaced.
    scripted = torch.jit.ScriptModule
    return [(m, dict(m._modules)) for m in model.modules() if not isinstance(m, scripted)]


def put_back(children: Children) -> None:
    """Gives modules the children again that they had, in their order."""
    for module, held in children:
        module._modules.clear()
        module._modules.update(held)


def emptied_by(sections: Sequence[Section]) -> list[nn.Module]:
    """The blocks that do nothing once sections are gone from a model that has them all."""
    found = Counter(section.block for section in sections if section.block is not None)
    return [block.link.module for block, count in found.items() if count == len(block.ends)]


def _put_all(model: nn.Module, pairs: Swapped) -> Swapped:
    for module, remainder in pairs:
        _resemble(remainder, module)
        for place in places(model, module):
            path, _, key = place.rpartition(".")
            setattr(model.get_submodule(path), key, remainder)
    return pairs


def places(model: nn.Module, module: nn.Module) -> list[str]:
    """The names that a module has in a model."""
    return [name for name, each in model.named_modules(remove_duplicate=False) if each is module]


def _resemble(remainder: nn.Module, module: nn.Module) -> None:
    """Makes a remainder look like what it stands for, to those who read attributes of it."""
    old = set(module.modules())
    for part in remainder.modules():
        if part not in old:
            part.training = module.training
    if isinstance(remainder, PassThrough):
        # transformers' models ask a layer for its kind, and for the mask that it is to be given.
        for name, value in vars(module).items():
            if isinstance(value, str | int | float) and not hasattr(remainder, name):
                setattr(remainder, name, value)
