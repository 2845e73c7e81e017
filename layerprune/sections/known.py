"""Sections that are known by their class, and the order in which known networks run their parts."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

from torch import nn

from layerprune.sections.base import Adapter, ResidualAdapter
from layerprune.sections.residual import GatedResidual


@functools.cache
def _twins_for(library: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"layerprune.sections.{library}")
    except ImportError:  # another version, with its blocks elsewhere
        return None


def _known_libraries() -> list[ModuleType]:
    """Our modules for the libraries of models that somebody has imported: no others are here."""
    found = [_twins_for(name) for name in ("torchvision", "timm") if name in sys.modules]
    return [library for library in found if library is not None]


def forward_order(module: nn.Module) -> tuple[str, ...]:
    """The children that a module runs one on the output of another; none where that is not known.

    ``nn.Sequential`` and known networks, by their exact class.
    """
    if type(module) is nn.Sequential:
        return tuple(module._modules)
    for library in _known_libraries():
        if type(module) in library.FORWARD_ORDER:
            return library.FORWARD_ORDER[type(module)]
    return ()


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a `GatedResidual` or a known block, gated already or not."""
    if isinstance(module, GatedResidual):
        return ResidualAdapter()
    for library in _known_libraries():
        for adapter in library.ADAPTERS:
            if type(module) in (adapter.original, adapter.twin):
                return adapter
    return None
