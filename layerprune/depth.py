"""What the configuration of a model of transformers says of its depth.

Such models are known by their attributes; transformers need not be installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from layerprune.sections.placeholders import PassThrough

ELIMINATED = "layerprune_eliminated"
"""What a configuration's list of lost sections is called; names in a model built from it."""

_DEPTHS = {
    "decoder": ("num_decoder_layers", "decoder_layers"),
    "encoder": ("encoder_layers", "num_layers"),
    "": ("num_hidden_layers",),
}
"""Names of a configuration's depth, by a word in the container's name."""
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
"""Lists of a configuration with an element for each layer."""


def configurations(model: nn.Module) -> list[object]:
    """The configurations of a model and of its modules, and those within them."""
    found: dict[int, object] = {}
    waiting = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "to_dict") and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return list(found.values())


def misfits(model: nn.Module) -> list[str]:
    """Weights that a model of transformers has and one built of its configuration has not.

    Or the other way around, but for what an elimination has left a place of; with the reason where
    nothing can be built.

    Args:
        model: nothing is said of one that is not transformers' own.
    """
    if getattr(type(model), "config_class", None) is None:
        return []
    try:
        # As it will be read from a file.
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            built = type(model)(config).state_dict()
    except Exception as error:
        return [str(error).partition("\n")[0]]
    own, modules = model.state_dict(), dict(model.named_modules(remove_duplicate=False))
    wrong = [key for key in own if key not in built or built[key].shape != own[key].shape]
    return wrong + [key for key in built if key not in own and not _left_empty(key, modules)]


def _left_empty(key: str, modules: Mapping[str, nn.Module]) -> bool:
    while key not in modules:
        key = key.rpartition(".")[0]
    return isinstance(modules[key], nn.Identity | PassThrough)


def note_eliminated(model: nn.Module, names: Iterable[str], known: Collection[str] = ()) -> None:
    """Names in a model's configuration what it has lost.

    Args:
        model: left alone if it has no configuration.
        names: the sections that it lost.
        known: all that a run has to say something about; others, lost before, stay on the list.
    """
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        earlier = [name for name in getattr(config, ELIMINATED, []) if name not in known]
        setattr(config, ELIMINATED, [*earlier, *names])


def rename_eliminated(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Follows a renumbering in the configuration's list: what has no place any more leaves it.

    Args:
        model: the model, renumbered.
        before: its modules by the names that they had.
    """
    lost = getattr(getattr(model, "config", None), ELIMINATED, None)
    if lost is not None:
        now = {module: name for name, module in model.named_modules()}
        left = [before[name] for name in lost if name in before]
        setattr(model.config, ELIMINATED, [now[module] for module in left if module in now])


def shrink_config(model: nn.Module, container: str, kept: Sequence[int], before: int) -> None:
    """Tells the configuration that a container of layers has fewer of them.

    Args:
        model: left alone if no configuration speaks of the container.
        container: its qualified name.
        kept: places of the layers that are left.
        before: how many there were.

    Raises:
        ValueError: if it derives the layers' types from their number, and says something else.
    """
    parts = container.split(".")
    for length in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        for word, names in _DEPTHS.items():
            for name in names if word in container else ():
                if getattr(config, name, None) == before:
                    _shorten(config, name, kept, before)
                    return


def _shorten(config: object, depth: str, kept: Sequence[int], before: int) -> None:
    listed = {name: getattr(config, name, None) for name in _BY_LAYER}
    setattr(config, depth, len(kept))
    for name, values in listed.items():
        if isinstance(values, list) and len(values) == before:
            left = [values[place] for place in kept]
            with contextlib.suppress(AttributeError):  # a property
                setattr(config, name, left)
            if getattr(config, name) != left:
                raise ValueError(
                    f"{type(config).__name__} derives {name} from {depth}, and cannot say which "
                    "layers are left: leave the places of what was eliminated as they are"
                )
