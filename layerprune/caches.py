"""Where the layers of a model of transformers keep their keys and values.

Such models are known by their attributes; transformers need not be installed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from layerprune.sections.placeholders import PassThrough

_NUMBERS = ("layer_idx", "layer_id")
"""What a module calls its place in a cache."""
SET_HERE = (*_NUMBERS, "attention_type")
"""Attributes of a layer's modules that `number_caches` sets."""


def number_caches(model: nn.Module) -> None:
    """Numbers the layers that keep keys and values as they are left, without gaps.

    A cache is asked for its length at its first layer: that one must not be a layer that is gone.
    Where a configuration tells layers of several types apart (full and sliding attention, say), a
    cache has places for each type, and a layer gets one of its own type.
    """
    config = getattr(model, "config", None)
    by_number = getattr(config, "scale_attn_by_inverse_layer_idx", False)
    kinds: dict[str, list[nn.Module]] = {}
    hybrids: dict[str, dict[int, list[nn.Module]]] = {}
    for name, module in model.named_modules():
        if by_number and not hasattr(module, "scaling"):
            continue  # in older versions GPT-2's number is part of what a layer computes
        if _number(module) is not None and not isinstance(module, PassThrough):
            hybrid = _place_in_hybrid(model, name)
            if hybrid is None:
                kinds.setdefault(re.sub(r"\d+", "#", name), []).append(module)
            else:
                layers = hybrids.setdefault(hybrid[0], {})
                layers.setdefault(hybrid[1], []).append(module)
    for modules in kinds.values():
        for number, module in enumerate(modules):
            _set_number(module, number)
    for container, layers in hybrids.items():
        blocks = model.get_submodule(container).children()
        _number_by_type(_config_of(model, container), blocks, layers)


def _number(module: nn.Module) -> str | None:
    """The attribute by which a module knows its place, if it has one."""
    # In others' models `layer_id` is more likely part of what a layer computes.
    theirs = any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__)
    names = _NUMBERS if theirs else _NUMBERS[:1]
    return next((name for name in names if isinstance(getattr(module, name, None), int)), None)


def _set_number(module: nn.Module, number: int) -> None:
    setattr(module, _number(module), number)


def _config_of(model: nn.Module, name: str) -> object | None:
    """The configuration that tells the types of layers: of the module nearest to a name."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        if isinstance(getattr(config, "layer_types", None), list):
            return config
    return None


def _place_in_hybrid(model: nn.Module, name: str) -> tuple[str, int] | None:
    """The container of layers of several types that a module is in, and its layer's place there."""
    config = _config_of(model, name)
    if config is None or len(set(config.layer_types)) < 2:
        return None
    parts = name.split(".")
    for length, part in enumerate(parts[:-1]):
        container = ".".join(parts[:length])
        layers = model.get_submodule(container)
        if part.isdigit() and len(layers._modules) == len(config.layer_types):
            return container, int(part)
    return None


def _number_by_type(
    config: object, blocks: Iterable[nn.Module], layers: Mapping[int, Sequence[nn.Module]]
) -> None:
    """Gives layers the numbers of a cache's places of their types.

    Args:
        config: its types are those of the cache's places, too. An attention's type of which no
            layer is left might have the first place and never fill it: it goes, unless the
            configuration derives its types from something else, or no attention is left.
        blocks: all layers, or what is left of them.
        layers: those of their modules that keep something, by the places of the layers.
    """
    types = config.layer_types
    left = [types[place] for place in sorted(layers)]
    # Only an attention's place is asked for a length.
    attention = next(filter(_tells_length, left), None)
    present = [k if k in left or not _tells_length(k) else attention for k in types]
    if attention is not None and present != types:
        with contextlib.suppress(AttributeError):
            config.layer_types = types = present
    for place, block in enumerate(blocks):
        # What is left of a layer may ask for the mask of its type by a name of its own.
        if hasattr(block, "attention_type"):
            block.attention_type = types[place]
    free = {kind: [i for i, each in enumerate(types) if each == kind] for kind in left}
    for place in sorted(layers):
        number = free[types[place]].pop(0)
        for module in layers[place]:
            _set_number(module, number)


def _tells_length(kind: str) -> bool:
    """Whether a cache's places of a type know how much they hold: not those of recurrent layers."""
    return kind.endswith("attention") and kind != "linear_attention"
