"""Stochastic depth that a model has of its own beside the gates, as those of timm have."""

from __future__ import annotations

from torch import nn

_RATES = ("p", "drop_prob")


def _attribute(module: nn.Module) -> str | None:
    """The name of a module's rate, if it is one that leaves out branches at random."""
    kind = type(module).__name__
    if not kind.endswith(("StochasticDepth", "DropPath")):
        return None
    return next((name for name in _RATES if isinstance(getattr(module, name, None), float)), None)


def stochastic_depth(model: nn.Module) -> dict[str, float]:
    """The rates above 0 at which a model leaves out branches of rows by itself.

    Args:
        model: any module; such modules are known by their class's name, ``StochasticDepth`` or
            ``DropPath`` with anything in front.

    Returns:
        The rate by the module's name.
    """
    return {
        name: rate
        for name, module in model.named_modules()
        if (attribute := _attribute(module)) and (rate := getattr(module, attribute)) > 0
    }


def replace_stochastic_depth(model: nn.Module) -> dict[str, float]:
    """Sets these rates to 0, so that the gates alone decide what runs.

    A fixed rate keeps on dropping rows of sections whose theta has gone to 1, and hides from the
    evidence what a section is worth. The gates regularise while they are drawn.

    Args:
        model: changed in place.

    Returns:
        The rates there were, by the module's name.
    """
    rates = stochastic_depth(model)
    for name in rates:
        module = model.get_submodule(name)
        setattr(module, _attribute(module), 0.0)
    return rates
